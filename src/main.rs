//! The `vmfold` command. All of its code is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmfold::cli::main()
}
