#!/bin/sh
# Counts, and writes a line for each number; goes on where the file `count` says.
n=0
[ -f count ] && n=$(cat count) && echo "going on after $n"
while [ "$n" -lt "${1:-30}" ]; do
    n=$((n + 1))
    echo "line $n" >> lines.txt
    echo "$n" > count
    echo "at $n"
    sleep "${2:-0.5}"
done
sort -u lines.txt | wc -l > distinct
echo finished
