#!/usr/bin/env bash
# What sharing costs the machines afterwards: bash tests/bench/cost.sh POOL.fsimg [OPTIONS-OF-RECLAIM...]
#
# POOL.fsimg is a filesystem in a file, with images in its folder `pool`. A copy of it in $WORK (default: the file's folder) is
# reclaimed; before and after, every image is read in order and at random with cold caches, and copied with `cp --reflink`. Prints a
# table in Markdown: sums over all images, each the least of $ROUNDS rounds (default 3), and the worst image. Takes root, and fio
# (installed where it is missing). Nothing here decides a test.
set -euo pipefail
image=$(realpath "$1"); shift; cd "$(dirname "$0")/../.."
. tests/install.sh
need fio fio fio
cargo build --quiet --release --locked
vmfold=$PWD/target/release/vmfold rounds=${ROUNDS:-3}
work=${WORK:-$(dirname "$image")}; dir=$(mktemp -d "$work/bench.XXXXXX"); mnt=$dir/mnt; mkdir "$mnt"
trap 'umount -q "$mnt" || true; rm -rf --one-file-system "$dir"' EXIT
cp --sparse=always "$image" "$dir/fs"; mount -o loop "$dir/fs" "$mnt"
fio_ms() { # file, further options: milliseconds that reading took
  echo 3 > /proc/sys/vm/drop_caches
  fio --name=x --filename="${1//:/\\:}" --readonly --output-format=json --ioengine=psync "${@:2}" |
    python3 -c 'import json,sys; print(json.load(sys.stdin)["jobs"][0]["read"]["runtime"])'
}
copy_us() { # file: microseconds that a reflink took
  local begin end; begin=$(date +%s%N); cp --reflink=always "$1" "$mnt/copy"; sync -f "$mnt"; end=$(date +%s%N)
  rm "$mnt/copy"; sync -f "$mnt"; echo $(((end - begin) / 1000))
}
measure() { # for each image: name, ms in order, ms at random, us of a reflink, extents in its map
  find "$mnt/pool" -type f -name '*.img*' -size +1M | sort | while read -r file; do
    local s r c best_s= best_r= best_c=
    for _ in $(seq "$rounds"); do
      s=$(fio_ms "$file" --rw=read --bs=1M); r=$(fio_ms "$file" --rw=randread --bs=4k --number_ios=20000 --randseed=1); c=$(copy_us "$file")
      if [ -z "$best_s" ] || [ "$s" -lt "$best_s" ]; then best_s=$s; fi
      if [ -z "$best_r" ] || [ "$r" -lt "$best_r" ]; then best_r=$r; fi
      if [ -z "$best_c" ] || [ "$c" -lt "$best_c" ]; then best_c=$c; fi
    done
    echo "${file#"$mnt"/pool/} $best_s $best_r $best_c $(filefrag "$file" | grep -o '[0-9]* extent' | cut -d' ' -f1) $(stat -c %s "$file")"
  done
}
measure > "$dir/before"
"$vmfold" reclaim "$@" --index "$dir/index" "$mnt/pool" > /dev/null
measure > "$dir/after"
python3 - "$dir/before" "$dir/after" <<'P'
import sys
read = lambda name: {line.split()[0]: list(map(int, line.split()[1:])) for line in open(name)}
before, after = map(read, sys.argv[1:])
print("| all images | before | after | times | worst image, times |\n|---|---|---|---|---|")
rows = [("read in order, s", 0, 1e3), ("20,000 random reads of 4 KiB, s", 1, 1e3), ("cp --reflink and sync, s", 2, 1e6), ("extents in their maps", 3, 1)]
for name, column, unit in rows:
    one, two = (sum(row[column] for row in rows.values()) for rows in (before, after))
    worst = max((after[image][column] / max(before[image][column], 1), image) for image in before)
    print(f"| {name} | {one/unit:.2f} | {two/unit:.2f} | {two/max(one, 1):.2f} | {worst[0]:.2f} ({worst[1]}) |")
gib = sum(row[4] for row in before.values()) / 2**30
print(f"| extents for each GiB | {sum(r[3] for r in before.values())/gib:.0f} | {sum(r[3] for r in after.values())/gib:.0f} | | |")
P
