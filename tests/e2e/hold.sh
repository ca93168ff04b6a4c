# Read before a shell script: in the job's first run it stands still after `echo "$HOLD"`.
echo() {
    command echo "$@"
    if [ "$*" = "$HOLD" ]; then
        while [ "$SUBLET_EPOCH" = 1 ]; do sleep 0.1; done
    fi
}
