#!/usr/bin/env bash
# What sharing and compression cost the machines afterwards: bash tests/bench/cost.sh POOL.fsimg [OPTIONS-OF-RECLAIM...]
#
# POOL.fsimg is a filesystem in a file, with images in its folder `pool`. Of two copies of it in $WORK (default: the file's folder)
# one is reclaimed; then every image is read in order and at random with cold caches, and copied with `cp --reflink`, in the one and
# the other in turn. Prints a table in Markdown: sums over all images, each the least of $ROUNDS rounds (default 5), and the worst
# image. Takes root, and fio (installed where it is missing). Nothing here decides a test.
set -euo pipefail
image=$(realpath "$1"); shift; cd "$(dirname "$0")/../.."
. tests/install.sh
need fio fio fio
cargo build --quiet --release --locked
vmfold=$(realpath "${CARGO_TARGET_DIR:-target}")/release/vmfold rounds=${ROUNDS:-5}
work=${WORK:-$(dirname "$image")}; dir=$(mktemp -d "$work/bench.XXXXXX")
trap 'umount -q "$dir/before" "$dir/after" || true; rm -rf --one-file-system "$dir"' EXIT
for one in before after; do
  mkdir "$dir/$one"; cp --sparse=always "$image" "$dir/$one.fs"
  # Two filesystems with one UUID cannot be mounted at a time.
  case $(blkid -o value -s TYPE "$image") in
    btrfs) [ "$one" = before ] || btrfstune -m "$dir/$one.fs" > /dev/null; mount -o loop "$dir/$one.fs" "$dir/$one" ;;
    *) mount -o loop,nouuid "$dir/$one.fs" "$dir/$one" ;;
  esac
done
"$vmfold" reclaim "$@" --index "$dir/index" "$dir/after/pool" > /dev/null
fio_ms() { # file, further options: milliseconds that reading took
  echo 3 > /proc/sys/vm/drop_caches
  fio --name=x --filename="${1//:/\\:}" --readonly --output-format=json --ioengine=psync "${@:2}" |
    python3 -c 'import json,sys; print(json.load(sys.stdin)["jobs"][0]["read"]["runtime"])'
}
copy_us() { # file, folder: microseconds that a reflink took
  local begin end; begin=$(date +%s%N); cp --reflink=always "$1" "$2/copy"; sync -f "$2"; end=$(date +%s%N)
  rm "$2/copy"; sync -f "$2"; echo $(((end - begin) / 1000))
}
# For each image and side: which, name, ms in order, ms at random, us of a reflink, extents in its map, size.
(cd "$dir/before/pool"; find . -type f -name '*.img*' -size +1M | sort) | while read -r name; do
  for _ in $(seq "$rounds"); do
    for one in before after; do
      file=$dir/$one/pool/$name
      echo "$one ${name#./} $(fio_ms "$file" --rw=read --bs=1M) $(fio_ms "$file" --rw=randread --bs=4k --number_ios=20000 --randseed=1)" \
        "$(copy_us "$file" "$dir/$one") $(filefrag "$file" | grep -o '[0-9]* extent' | cut -d' ' -f1) $(stat -c %s "$file")"
    done
  done
done > "$dir/measured"
python3 - "$dir/measured" <<'P'
import sys
sides = {"before": {}, "after": {}}
for line in open(sys.argv[1]):
    side, name, *row = line.split()
    row, known = list(map(int, row)), sides[side].get(name)
    sides[side][name] = [min(pair) for pair in zip(row, known)] if known else row
before, after = sides["before"], sides["after"]
print("| all images | before | after | times | worst image, times |\n|---|---|---|---|---|")
rows = [("read in order, s", 0, 1e3), ("20,000 random reads of 4 KiB, s", 1, 1e3), ("cp --reflink and sync, s", 2, 1e6), ("extents in their maps", 3, 1)]
for name, column, unit in rows:
    one, two = (sum(row[column] for row in rows.values()) for rows in (before, after))
    worst = max((after[image][column] / max(before[image][column], 1), image) for image in before)
    print(f"| {name} | {one/unit:.2f} | {two/unit:.2f} | {two/max(one, 1):.2f} | {worst[0]:.2f} ({worst[1]}) |")
gib = sum(row[4] for row in before.values()) / 2**30
print(f"| extents for each GiB | {sum(r[3] for r in before.values())/gib:.0f} | {sum(r[3] for r in after.values())/gib:.0f} | | |")
P
