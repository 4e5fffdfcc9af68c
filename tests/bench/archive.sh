#!/usr/bin/env bash
# Benchmark of archives beside peers, in one run: bash tests/bench/archive.sh POOL.fsimg
#
# POOL.fsimg is a btrfs in a file, with images in its folder `pool`; it is only read. Archives and the filesystem that is restored to
# are made in $WORK (default: the file's folder; /dev/shm takes the disk out of the figures). Caches are cold before each command.
# What is restored is compared with the pool. Prints a table in Markdown. Takes root, borgbackup, restic, zpaq and casync (installed
# where they are missing). Nothing here decides a test.
set -euo pipefail
image=$(realpath "$1"); cd "$(dirname "$0")/../.."
. tests/install.sh
need borg borgbackup borgbackup
need restic restic restic
need zpaq zpaq zpaq
need casync casync casync
need openssl openssl openssl
[ -x /usr/bin/time ] || need /usr/bin/time time time
cargo build --quiet --release --locked
export VMFOLD=$(realpath "${CARGO_TARGET_DIR:-target}")/release/vmfold RESTIC_PASSWORD=bench
export BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes BORG_RELOCATED_REPO_ACCESS_IS_OK=yes
work=${WORK:-$(dirname "$image")}; dir=$(mktemp -d "$work/bench.XXXXXX"); export BORG_BASE_DIR=$dir/borg
mkdir "$dir/from" "$dir/to"; trap 'umount -q "$dir/from" "$dir/to" || true; rm -rf --one-file-system "$dir"' EXIT
mount -o loop,ro "$image" "$dir/from"; export P=$dir/from/pool
(cd "$P" && find . -type f -exec openssl dgst -r -sha256 {} + | sort -k 2) > "$dir/sums"
timed() { # command; leaves seconds and MiB of memory in $took
  sync; echo 3 > /proc/sys/vm/drop_caches
  /usr/bin/time -f '%e %M' -o "$dir/time" bash -c "$1" > "$dir/log" 2>&1 || { cat "$dir/log" >&2; return 1; }
  read -r seconds memory < <(tail -1 "$dir/time"); took="$seconds s, $((memory / 1024)) MiB"
}
row() { # name store restore, with $P for the pool, $A for a folder for the archive and $T for one to restore to
  export A=$dir/archive T=$dir/to; rm -rf "$A"; mkdir "$A"
  timed "$2"; local stored=$took size; size=$(($(du -sb "$A" | cut -f1) >> 20))
  [ -n "$3" ] || { echo "| $1 | $size | $stored | not measured | | |"; return; }
  truncate -s 64G "$dir/fs"; mkfs.btrfs -q "$dir/fs" >/dev/null 2>&1; mount -o loop "$dir/fs" "$T"
  timed "$3"; local restored=$took used root same=no
  sync -f "$T"; btrfs filesystem sync "$T" >/dev/null
  used=$(btrfs filesystem df -b "$T" | awk -F'used=' '/^Data/ {print int($2 / 1048576)}')
  root=$(cd "$P" && find . -type f | sort | head -1); root=$(find "$T" -type f -path "*/${root#./}" | head -1); root=${root%/"$(cd "$P" && find . -type f | sort | head -1 | sed 's|^\./||')"}
  (cd "$root" && find . -type f -exec openssl dgst -r -sha256 {} + | sort -k 2) | cmp -s - "$dir/sums" && same=yes
  umount "$T"; rm "$dir/fs"
  echo "| $1 | $size | $stored | $restored | $used | $same |"
}
echo "| | archive, MiB | storing | restoring | restored, MiB on disk | identical |"
echo "|---|---|---|---|---|---|"
row "vmfold" '"$VMFOLD" export "$A/a.vmfold" --index "$A/../index" "$P"' '"$VMFOLD" import "$A/a.vmfold" --index "$A/../index" --to "$T"'
row "borg, buzhash 16 KiB, zstd 3" 'borg init -e none "$A/r" && cd "$P" && borg create --sparse --chunker-params buzhash,10,16,14,4095 -C zstd,3 "$A/r::a" .' 'cd "$T" && borg extract --sparse "$A/r::a"'
# Before 0.15 restic writes holes out as zeros, which a disk in memory may not hold: then it only stores.
if restic restore --help | grep -q sparse; then sparse='restic -q --no-cache -r "$A/r" restore latest --sparse --target "$T"'; else sparse=; fi
row "restic" 'restic init -q -r "$A/r" && cd "$P" && restic -q --no-cache backup -r "$A/r" .' "$sparse"
row "zpaq -m1" 'cd "$P" && zpaq a "$A/a.zpaq" . -m1' 'cd "$T" && zpaq x "$A/a.zpaq"'
row "casync" 'casync make --store="$A/store.castr" "$A/a.caidx" "$P"' 'casync extract --store="$A/store.castr" "$A/a.caidx" "$T/restored"'
