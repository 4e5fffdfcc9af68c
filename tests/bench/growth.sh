#!/usr/bin/env bash
# How time grows with the size of a pool and with revisions: bash tests/bench/growth.sh PICTURE.svg
#
# Makes a scratch btrfs in $WORK (default: the folder for temporary files; it takes 40 GB) with images of 1 GB each, of which every second
# is a copy of the one before with a sixteenth overwritten. Measures, with cold caches, the dry run, the run, and a dry run after it, at
# 5, 10, 20 and 30 GB; then, at 5 GB, with 1, 2, 4, 8 and 16 revisions of each image, a hundredth overwritten between two of them.
# Prints a table in Markdown and draws it. Takes root. Nothing here decides a test.
set -euo pipefail
picture=$(realpath "$1"); cd "$(dirname "$0")/../.."
. tests/install.sh
need openssl openssl openssl
[ -x /usr/bin/time ] || need /usr/bin/time time time
cargo build --quiet --release --locked
vmfold=$(realpath "${CARGO_TARGET_DIR:-target}")/release/vmfold
dir=$(mktemp -d "${WORK:-${TMPDIR:-/tmp}}/bench.XXXXXX"); mnt=$dir/mnt; mkdir "$mnt"
trap 'umount -q "$mnt" || true; rm -rf --one-file-system "$dir"' EXIT
fresh() { umount -q "$mnt" || true; rm -rf "$dir/fs" "$dir/index"; truncate -s 100G "$dir/fs"; mkfs.btrfs -q "$dir/fs" >/dev/null 2>&1; mount -o loop "$dir/fs" "$mnt"; mkdir "$mnt/pool"; }
# The end of the pipe closes it: openssl fails by that, as it should.
stream() { { openssl enc -aes-128-ctr -pass "pass:$1" -nosalt -pbkdf2 -iter 1 < /dev/zero 2>/dev/null || true; } | head -c "$2"; }
overwrite() { # image pieces seed: pieces of 1 MB, spread evenly
  local n; for n in $(seq "$2"); do stream "$3.$n" 1000000 | dd of="$1" bs=1000000 seek=$((n * 1000 / $2 - 1)) conv=notrunc iflag=fullblock status=none; done
}
image() { # number; not by cat or cp, which would share right away
  local path=$mnt/pool/vm$1.img
  if [ $(($1 % 2)) = 1 ]; then stream "$1" 1000000000 > "$path"; else dd if="$mnt/pool/vm$(($1 - 1)).img" of="$path" bs=1M status=none; overwrite "$path" 62 "$1"; fi
}
timed() { # arguments: seconds and MiB
  sync -f "$mnt"; echo 3 > /proc/sys/vm/drop_caches
  /usr/bin/time -f '%e %M' -o "$dir/time" "$vmfold" "$@" --index "$dir/index" "$mnt/pool" > "$dir/log"; tail -1 "$dir/time"
}
measure() { # kind x
  local first run again freed
  first=$(timed reclaim --dry-run); run=$(timed reclaim); freed=$(grep -o 'Freed [^:]*' "$dir/log" | cut -d' ' -f2-); again=$(timed reclaim --dry-run)
  echo "$1 $2 $first $run $again" >> "$dir/rows"
  echo "| $2 $1 | ${first% *} | ${run% *} | ${again% *} | $(($(echo "$first $run $again" | tr ' ' '\n' | sed -n '2p;4p;6p' | sort -n | tail -1) / 1024)) | $freed |"
}
echo "| pool | dry run, s | run, s | dry run after it, s | MiB of memory at most | freed |"
echo "|---|---|---|---|---|---|"
for size in 5 10 20 30; do fresh; for n in $(seq "$size"); do image "$n"; done; measure GB "$size"; done
for revisions in 1 2 4 8 16; do
  fresh
  for n in $(seq 5); do image "$n"; done
  for r in $(seq 2 "$revisions"); do
    for n in $(seq 5); do cp --reflink=always "$mnt/pool/vm$n.img" "$mnt/pool/vm$n.img.$r@2026-01-01T00:00:00Z"; overwrite "$mnt/pool/vm$n.img" 10 "$n.$r"; done
  done
  measure revisions "$revisions"
done
python3 - "$dir/rows" "$picture" <<'P'
import sys
rows = [line.split() for line in open(sys.argv[1])]
width, height, left, bottom = 360, 240, 46, 34
def panel(kind, label, shift):
    points = [(float(x), [float(v) for v in rest[::2]]) for name, x, *rest in rows if name == kind]
    x_max, y_max = max(x for x, _ in points), max(max(ys) for _, ys in points) * 1.1
    at = lambda x, y: (shift + left + x / x_max * (width - left - 12), height - bottom - y / y_max * (height - bottom - 34))
    out = []
    for step in range(5):
        y = y_max * step / 4
        x0, y0 = at(0, y)
        out.append(f'<path class="grid" d="M{x0:.1f} {y0:.1f}H{at(x_max, y)[0]:.1f}"/><text x="{x0 - 5:.1f}" y="{y0 + 4:.1f}" text-anchor="end">{y:.1f}</text>')
    for x, _ in points:
        px, py = at(x, 0)
        out.append(f'<text x="{px:.1f}" y="{py + 14:.1f}" text-anchor="middle">{x:g}</text>')
    for number, name in enumerate(["dry run", "run", "dry run after it"]):
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(x, ys[number]) for x, ys in points))
        out.append(f'<polyline class="s{number}" points="{line}"/>')
        out.append(f'<path class="s{number}" d="M{shift + left + 4 + number * 90} 14h18"/><text x="{shift + left + 26 + number * 90}" y="18">{name}</text>')
    out.append(f'<text x="{shift + (left + width) / 2:.1f}" y="{height - 4}" text-anchor="middle">{label}</text>')
    return "\n".join(out)
style = "text{font:11px sans-serif;fill:#555}.grid{stroke:#ddd;fill:none}polyline,.s0,.s1,.s2{fill:none;stroke-width:2}.s0{stroke:#1b7f79}.s1{stroke:#c2501d}.s2{stroke:#5b4b9a}"
open(sys.argv[2], "w").write(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * width} {height}" role="img" aria-label="Seconds by size of the pool and by revisions"><style>{style}</style>\n<rect width="100%" height="100%" fill="#fff"/>\n{panel("GB", "seconds by GB of images", 0)}\n{panel("revisions", "seconds by revisions of 5 images", width)}\n</svg>\n')
P
