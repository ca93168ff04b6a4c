#!/bin/sh
# A job in no language that sublet knows: it saves by the convention of folders alone.
#
#     sublet run --gpus cpu --max-price 0.10 --budget 1 --input anything.sh:/job/anything.sh \
#         --outputs /out IMAGE sh /job/anything.sh /out 1000
#
# It adds up the numbers from 1 on. $SUBLET_CHECKPOINT_DIR is where agent and job meet: in/step-N is
# what to go on from; out/step-N.tmp is written, gets its DONE, and is renamed to out/step-N; STOP
# and SAVE are asked for; exit 75 means: stopped when asked, and it can go on elsewhere.
set -eu
out=${1:-out} last=${2:-1000} every=100
here=${SUBLET_CHECKPOINT_DIR:-.sublet/checkpoint}
mkdir -p "$out" "$here/out"

step=0 sum=0
for folder in "$here"/in/step-*; do
    [ -f "$folder/DONE" ] && [ "${folder##*/step-}" -ge "$step" ] || continue
    step=${folder##*/step-}
    sum=$(cat "$folder/sum")
done
echo "starting at $step"

save() {
    # A checkpoint that can be seen is a whole one.
    [ ! -d "$here/out/step-$step" ] || return 0
    tmp=$here/out/step-$step.tmp
    rm -rf "$tmp"
    mkdir "$tmp"
    echo "$sum" > "$tmp/sum"
    size=$(wc -c < "$tmp/sum" | tr -d ' ')
    printf '{"step": %s, "files": [{"path": "sum", "size_bytes": %s}], "meta": {}}\n' \
        "$step" "$size" > "$tmp/DONE"
    mv "$tmp" "$here/out/step-$step"
    rm -f "$here/SAVE"
}

stopping=0
trap 'stopping=1' TERM
while [ "$step" -lt "$last" ]; do
    step=$((step + 1))
    sum=$((sum + step))
    [ ! -e "$here/STOP" ] || stopping=1
    if [ $stopping = 1 ] || [ -e "$here/SAVE" ] || [ $((step % every)) = 0 ]; then
        save
    fi
    if [ $stopping = 1 ]; then
        echo "stopped at $step"
        exit 75
    fi
done
echo "$sum" > "$out/sum.txt"
