#!/usr/bin/env bash
# All benchmarks, and the tables and the picture of tests/bench/README.md from them: bash tests/bench/all.sh [POOL.fsimg]
#
# POOL.fsimg is a btrfs in a file, with images in its folder `pool`; without one, a pool is made of this machine's own programs. Works in
# $WORK (default: the folder for temporary files), which takes up to 60 GB and more than half an hour. Takes root.
set -euo pipefail
pool=${1:+$(realpath "$1")}; cd "$(dirname "$0")/../.."
. tests/install.sh
. tests/pool.sh
dir=$(mktemp -d "${WORK:-${TMPDIR:-/tmp}}/bench.XXXXXX"); export WORK=$dir
trap 'umount -q "$dir/guest" "$dir/mnt" || true; rm -rf --one-file-system "$dir"' EXIT
if [ -z "$pool" ]; then
  pool=$dir/pool.fsimg; mkdir "$dir/mnt"
  truncate -s 8G "$pool"; mkfs.btrfs -q "$pool" > /dev/null 2>&1; mount -o loop "$pool" "$dir/mnt"
  make_pool "$dir/mnt/pool" "$dir"
  umount "$dir/mnt"
fi
table() { # name command...: puts what a command prints in the place of the table of that name
  local name=$1; shift
  "$@" > "$dir/$name.md"
  python3 - "$name" "$dir/$name.md" <<'P'
import re, sys
name, table = sys.argv[1], open(sys.argv[2]).read().strip()
page = "tests/bench/README.md"
text = open(page).read()
begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
new, found = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n{table}\n{end}", text, flags=re.DOTALL)
assert found == 1, f"{page} has no place for the table `{name}`"
open(page, "w").write(new)
P
}
table reclaim bash tests/bench/reclaim.sh "$pool"
table cost bash tests/bench/cost.sh "$pool"
table cost-compressed bash tests/bench/cost.sh "$pool" --compress zstd
table archive bash tests/bench/archive.sh "$pool"
table sealed bash tests/bench/sealed.sh "$pool"
table parity bash tests/bench/parity.sh
table growth bash tests/bench/growth.sh testdata/growth.svg
