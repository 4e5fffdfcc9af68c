#!/usr/bin/env bash
# All tests: formatting, lints, licences, and every test there is, on real filesystems too. Takes root (asks for it by sudo).
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/install.sh
cargo fmt --check
cargo clippy --quiet --locked --all-targets -- -D warnings
cargo clippy --quiet --locked --no-default-features -- -D warnings
if command -v cargo-deny >/dev/null; then
  cargo deny --log-level error check bans licenses sources
else
  echo "cargo-deny is not installed: licences and sources of dependencies were not checked"
fi
# Tests on loop devices take root; building does not.
if [ "$(id -u)" = 0 ]; then
  cargo test --locked
else
  cargo test --locked --no-run
  CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER='sudo -E' CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER='sudo -E' cargo test --locked
fi
