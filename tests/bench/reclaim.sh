#!/usr/bin/env bash
# Benchmark of reclaim beside peers, in one run: bash tests/bench/reclaim.sh POOL.fsimg
#
# POOL.fsimg is a btrfs in a file, with images in its folder `pool`. Each run gets a fresh copy of it in $WORK (default: the
# file's folder; /dev/shm takes the disk out of the figures) and cold caches. Prints a table in Markdown. Takes root, and
# duperemove (installed where it is missing). Nothing here decides a test.
set -euo pipefail
image=$(realpath "$1"); cd "$(dirname "$0")/../.."
. tests/install.sh
need duperemove duperemove duperemove
[ -x /usr/bin/time ] || need /usr/bin/time time time
cargo build --quiet --release --locked
export VMFOLD=$(realpath "${CARGO_TARGET_DIR:-target}")/release/vmfold
work=${WORK:-$(dirname "$image")}; dir=$(mktemp -d "$work/bench.XXXXXX"); mnt=$dir/mnt; mkdir "$mnt"
trap 'umount -q "$mnt" || true; rm -rf --one-file-system "$dir"' EXIT
used() { sync -f "$mnt"; btrfs filesystem sync "$mnt" >/dev/null; btrfs filesystem df -b "$mnt" | awk -F'used=' '/^Data/ {print int($2 / 1048576)}'; }
row() { # name command, with $P for the pool and $D for a scratch folder
  cp --sparse=always "$image" "$dir/fs"; mount -o loop "$dir/fs" "$mnt"; export P=$mnt/pool D=$dir/scratch; rm -rf "$D"; mkdir "$D"
  local before after; before=$(used); (cd "$P" && find . -type f -exec stat -c '%n %Y %i %h %a %s' {} + | sort) > "$dir/stamps"
  echo 3 > /proc/sys/vm/drop_caches
  timeout 1800 /usr/bin/time -f '%e %M' -o "$dir/time" bash -c "$2" > "$dir/log" 2>&1 || echo "($1 ended with $?)" >&2
  after=$(used)
  local same=yes; (cd "$P" && find . -type f -exec stat -c '%n %Y %i %h %a %s' {} + | sort) | cmp -s - "$dir/stamps" || same=no
  read -r seconds memory < <(tail -1 "$dir/time")
  echo "| $1 | $before | $after | $seconds | $((memory / 1024)) | $same |"
  umount "$mnt"; rm "$dir/fs"
}
# Data only, in large pieces: what reads holes too, or through a pipe, takes longer than the disk does.
cat > "$dir/read" <<'P'
import os, sys
for folder, _, files in os.walk(sys.argv[1]):
    for name in files:
        with open(os.path.join(folder, name), "rb", buffering=0) as file:
            at, size = 0, os.fstat(file.fileno()).st_size
            try:
                while at < size:
                    at = os.lseek(file.fileno(), at, os.SEEK_DATA)
                    end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
                    while at < end:
                        at += len(os.pread(file.fileno(), min(4 << 20, end - at), at))
            except OSError as error:
                if error.errno != 6:  # ENXIO: no data behind
                    raise
P
export READ=$dir/read
echo "| | MiB on disk before | after | seconds | MiB of memory | times and inodes kept |"
echo "|---|---|---|---|---|---|"
row "reading the data of every image once" 'python3 "$READ" "$P"'
row "vmfold reclaim --dry-run" '"$VMFOLD" reclaim --dry-run --index "$D" "$P"'
row "vmfold reclaim" '"$VMFOLD" reclaim --index "$D" "$P"'
row "vmfold reclaim --min-run 4K" '"$VMFOLD" reclaim --min-run 4K --index "$D" "$P"'
row "vmfold reclaim --memory 1M" '"$VMFOLD" reclaim --memory 1M --index "$D" "$P"'
row "vmfold reclaim --compress zstd" '"$VMFOLD" reclaim --compress zstd --index "$D" "$P"'
row "vmfold reclaim --compress zstd:15" '"$VMFOLD" reclaim --compress zstd:15 --index "$D" "$P"'
row "btrfs filesystem defragment -czstd -r" 'btrfs filesystem defragment -czstd -r "$P"'
row "duperemove -dr" 'duperemove -qdr --hashfile="$D/hashes" "$P"'
row "duperemove -dr --dedupe-options=partial,same" 'duperemove -qdr --dedupe-options=partial,same --hashfile="$D/hashes" "$P"'
