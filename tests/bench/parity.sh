#!/usr/bin/env bash
# Benchmark of parity: bash tests/bench/parity.sh [MIB]
#
# Makes an image of so many MiB (512 if not said) that cannot be compressed, exports it without and with parity of 5 %, protects it later, and
# repairs what was done to it: one lost stretch of 5 %, and 6000 bad sectors of 4 KiB for each 512 MiB. Every healed archive is compared with what
# it was. $WORK has the files (default: /dev/shm, so that only the processor's part shows). Prints a table in Markdown. Needs Python.
# Nothing here decides a test.
set -euo pipefail
mib=${1:-512}; cd "$(dirname "$0")/../.."
. tests/install.sh
[ -x /usr/bin/time ] || need /usr/bin/time time time
[ -n "${VMFOLD:-}" ] || { cargo build --quiet --release --locked; VMFOLD=$(realpath "${CARGO_TARGET_DIR:-target}")/release/vmfold; }
dir=$(mktemp -d "${WORK:-/dev/shm}/bench.XXXXXX"); trap 'rm -rf --one-file-system "$dir"' EXIT
mkdir "$dir/pool"; head -c "${mib}M" /dev/urandom > "$dir/pool/a.img"
row() { # name, bytes that the rate is of, command
  /usr/bin/time -f '%e %M' -o "$dir/time" bash -c "$3" > "$dir/log" 2>&1 || { cat "$dir/log" >&2; return 1; }
  read -r seconds memory < <(tail -1 "$dir/time")
  awk -v name="$1" -v bytes="$2" -v s="$seconds" -v m="$memory" \
    'BEGIN { printf "| %s | %.2f | %d | %d |\n", name, s, bytes / 1048576 / (s > 0 ? s : 0.01), m / 1024 }'
}
export V=$VMFOLD D=$dir
size() { stat -c %s "$1"; }
damage() { # KIND: leaves a damaged archive in $D/bad
  cp "$dir/a.vmfold" "$dir/bad"
  python3 - "$dir/bad" "$1" <<'PY'
import os, random, sys
path, kind = sys.argv[1:]
size, draw = os.path.getsize(path), random.Random(7)
with open(path, "r+b") as file:
    if kind == "stretch":
        # What has parity is less than the whole: a twentieth of that.
        length = size * 5 // 106
        file.seek(draw.randrange(size - length)); file.write(bytes(length))
    else:
        for sector in draw.sample(range(size // 4096), 6000 * size // (1 << 29)):
            file.seek(sector * 4096); file.write(b"\x5a" * 4096)
PY
}
echo "| | seconds | MiB/s | MiB of memory |"
echo "|---|---|---|---|"
row "export" $((mib << 20)) '"$V" export "$D/plain.vmfold" --level 1 --index "$D/index" "$D/pool"'
row "export --parity 5" $((mib << 20)) '"$V" export "$D/a.vmfold" --parity 5 --level 1 --index "$D/index" "$D/pool"'
plain=$(size "$dir/plain.vmfold"); archive=$(size "$dir/a.vmfold")
row "protect" "$plain" '"$V" protect "$D/plain.vmfold"'
row "verify" "$archive" '"$V" verify "$D/a.vmfold"'
for kind in stretch sectors; do
  damage $kind; rm -f "$dir/copy"
  row "repair --to, $kind" "$archive" '"$V" repair "$D/bad" --to "$D/copy"'
  cmp "$dir/copy" "$dir/a.vmfold"; rm "$dir/copy"
  row "repair --in-place, $kind" "$archive" '"$V" repair "$D/bad" --in-place'
  cmp "$dir/bad" "$dir/a.vmfold"
done
awk -v a="$archive" -v p="$plain" 'BEGIN { printf "\nParity takes %.2f %% of the archive.\n", (a - p) * 100 / p }'
