//! The `vmfold` command: see the library for everything it does.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmfold::cli::main()
}
