//! Imports beside others who use the same files: other imports, exports, reclaims, and whoever has an image open, seen by `/proc` or not.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use common::{Mounted, Random, can_mount, sh, state_of};

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A filesystem with a pool of small images, of which two have a second name, and an archive of it.
struct Scene {
    fs: Mounted,
}

const NAMES: [&str; 6] = ["a.img", "b.img", "c.img", "d.img", "deep/a-link.img", "deep/b-link.img"];

impl Scene {
    fn new() -> Self {
        let scene = Self { fs: Mounted::btrfs() };
        Self::fill(&scene.fs.pool(), 1);
        let exported = scene.run(&["export", "one.vmfold", "pool"]);
        assert!(exported.status.success(), "{}", text(&exported));
        scene
    }

    fn fill(folder: &Path, seed: u64) {
        let mut random = Random(seed);
        std::fs::create_dir_all(folder.join("deep")).unwrap();
        for name in &NAMES[..4] {
            std::fs::write(folder.join(name), random.data(256 << 10)).unwrap();
        }
        for (name, link) in [("a.img", "deep/a-link.img"), ("b.img", "deep/b-link.img")] {
            std::fs::hard_link(folder.join(name), folder.join(link)).unwrap();
        }
        sh(&format!("sync -f {}", folder.display()));
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.fs.command();
        command.args(arguments).arg("--index").arg(self.fs.index());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Replaces the pool by what is in the archive, which must be refused, and change nothing.
    fn refused(&self, command: &mut Command, why: &str) {
        let state = state_of(&self.fs.pool());
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", text(&output));
        let said = text(&output);
        assert!(said.contains("in use, and not to be replaced"), "{said}");
        assert!(said.contains(why), "{said}");
        assert_eq!(state_of(&self.fs.pool()), state);
    }
}

const REPLACE: [&str; 5] = ["import", "one.vmfold", "--to", "pool", "--replace"];
const WITH_SEED: [&str; 7] = ["import", "one.vmfold", "--to", "pool", "--replace", "--seed", "pool"];

#[test]
fn an_image_that_someone_has_open_is_not_replaced_whoever_it_is() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    // The last names are looked at as well as the first ones, and the second name of an image as well as the first.
    for held in ["d.img", "deep/b-link.img"] {
        let path = scene.fs.pool().join(held);
        for arguments in [&REPLACE[..], &WITH_SEED] {
            let file = File::open(&path).unwrap();
            scene.refused(&mut scene.command(arguments), "open in");
            // In a namespace of its own, it does not see this process.
            let mut apart = Command::new("unshare");
            apart.args(["-p", "-f", "--mount-proc", env!("CARGO_BIN_EXE_vmfold")]);
            apart.args(arguments).arg("--index").arg(scene.fs.index());
            apart.current_dir(&scene.fs.mount);
            scene.refused(&mut apart, "/proc does not show");
            // What io_uring has registered is open in no process.
            let ring = registered(&file);
            drop(file);
            scene.refused(&mut scene.command(arguments), "/proc does not show");
            drop(ring);
        }
    }
    // The kernel lets go of what was registered a little later.
    let mut last = None;
    let is_replaced = (0..100).any(|_| {
        let output = scene.run(&WITH_SEED);
        let is_done = output.status.success();
        last = Some(output);
        std::thread::sleep(Duration::from_millis(if is_done { 0 } else { 100 }));
        is_done
    });
    assert!(is_replaced, "{}", last.map_or_else(String::new, |output| text(&output)));
}

/// A ring that has a file registered, for as long as it is open.
#[allow(unsafe_code, reason = "there is no other way to these calls")]
fn registered(file: &File) -> std::os::fd::OwnedFd {
    use std::os::fd::FromRawFd;
    /// Bytes of `struct io_uring_params`, and the operation `IORING_REGISTER_FILES` (`uapi/linux/io_uring.h`).
    const PARAMETERS_BYTES: usize = 120;
    const REGISTER_FILES: libc::c_uint = 2;
    let mut parameters = [0u64; PARAMETERS_BYTES / 8];
    // SAFETY: the kernel writes to the parameters, which are as large as they are to be.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) };
    assert!(ring >= 0, "io_uring: {}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new, and nobody else's.
    let ring = unsafe { std::os::fd::OwnedFd::from_raw_fd(i32::try_from(ring).unwrap()) };
    let files = [file.as_raw_fd()];
    // SAFETY: the kernel reads one descriptor.
    let done = unsafe {
        libc::syscall(
            libc::SYS_io_uring_register,
            ring.as_raw_fd(),
            REGISTER_FILES,
            files.as_ptr(),
            files.len(),
        )
    };
    assert_eq!(done, 0, "io_uring: {}", std::io::Error::last_os_error());
    ring
}

const USER: u32 = 12345;

#[test]
fn an_image_that_cannot_be_read_counts_as_in_use() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let mount = scene.fs.mount.display();
    let binary = scene.fs.mount.join("vmfold");
    std::fs::copy(env!("CARGO_BIN_EXE_vmfold"), &binary).unwrap();
    std::fs::set_permissions(scene.fs.mount.parent().unwrap(), std::fs::Permissions::from_mode(0o755)).unwrap();
    sh(&format!(
        "mkdir {mount}/index; chown -R {USER}:{USER} {mount}; chmod 0 {mount}/pool/c.img"
    ));
    let as_user = || {
        let mut command = Command::new("setpriv");
        command.args([&format!("--reuid={USER}"), &format!("--regid={USER}"), "--clear-groups"]);
        command.arg(&binary).args(REPLACE).args(["--index", "index"]);
        command.current_dir(&scene.fs.mount);
        command
    };
    scene.refused(&mut as_user(), "cannot be opened");
    // What belongs to another cannot be leased.
    sh(&format!("chmod 644 {mount}/pool/c.img; chown 0 {mount}/pool/c.img"));
    scene.refused(&mut as_user(), "cannot be leased");
    sh(&format!("chown {USER} {mount}/pool/c.img"));
    let output = as_user().output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
}

/// Hashes of what images of a restore are to be, by their names.
type Content = BTreeMap<PathBuf, blake3::Hash>;

/// Images by their names below a folder, without what an interrupted import left.
fn content(folder: &Path) -> Content {
    let entries = walkdir::WalkDir::new(folder).into_iter().filter_entry(|entry| {
        let name = entry.file_name().to_str().unwrap();
        !name.starts_with(".vmfold-")
    });
    let files = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_type().is_file());
    let below = |path: &Path| path.strip_prefix(folder).unwrap().to_owned();
    files
        .filter_map(|entry| Some((below(entry.path()), blake3::hash(&std::fs::read(entry.path()).ok()?))))
        .collect()
}

/// Waits for a run, which is killed after a time if one is given. Returns what it ended with; none if it was killed.
fn end(mut child: Child, kill_after: Option<Duration>) -> Option<Output> {
    if let Some(time) = kill_after {
        std::thread::sleep(time);
        let _ = child.kill();
    }
    let output = child.wait_with_output().unwrap();
    output.status.code().map(|_| output)
}

#[test]
#[allow(clippy::too_many_lines, reason = "a round and what must be true after it")]
fn whatever_runs_at_once_no_name_has_wrong_bytes() {
    const ROUNDS: u64 = 200;
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let (one, other) = (content(&scene.fs.pool()), scene.fs.mount.join("other"));
    Scene::fill(&other, 2);
    let two = content(&other);
    let exported = scene.run(&["export", "two.vmfold", "other"]);
    assert!(exported.status.success(), "{}", text(&exported));
    let to = scene.fs.mount.join("to");
    let index = |n: usize| scene.fs.mount.join(format!("index{n}"));
    let spawn = |n: usize, arguments: &[&str]| {
        let mut command = scene.fs.command();
        command.args(arguments).arg("--index").arg(index(n));
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let is_known = |content: &Content| {
        let is = |(name, hash): (&PathBuf, &blake3::Hash)| one.get(name) == Some(hash) || two.get(name) == Some(hash);
        content.iter().all(is)
    };
    let started = std::time::Instant::now();
    assert!(scene.run(&["import", "one.vmfold", "--to", "to"]).status.success());
    let takes = u64::try_from(started.elapsed().as_micros()).unwrap() * 3 / 2;
    let mut random = Random(7);
    let (mut succeeded, mut killed, mut archived) = ([0; 2], 0, 0);
    for round in 0..ROUNDS {
        if random.below(3) == 0 {
            std::fs::remove_dir_all(&to).unwrap();
        }
        std::fs::create_dir_all(&to).unwrap();
        let importing = |archive: &'static str, random: &mut Random| {
            let mut arguments = vec!["import", archive, "--to", "to", "--resume"];
            if random.below(4) > 0 {
                arguments.push("--replace");
            }
            arguments
        };
        let first = importing("one.vmfold", &mut random);
        let second = match round % 4 {
            0 | 1 => importing("two.vmfold", &mut random),
            2 => vec!["export", "both.vmfold", "to"],
            _ => vec!["reclaim", "to", "--min-run", "4K"],
        };
        let delays = [random.below(takes), random.below(takes)].map(Duration::from_micros);
        let kills = [random.below(3), random.below(3)].map(|n| (n == 0).then(|| random.below(takes)));
        let kills = kills.map(|time| time.map(Duration::from_micros));
        let commands = [first.clone(), second.clone()];
        let before = content(&to);
        let outputs: Vec<Option<Output>> = std::thread::scope(|scope| {
            let runs: Vec<_> = (0..2)
                .map(|n| {
                    let (arguments, spawn) = (&commands[n], &spawn);
                    scope.spawn(move || {
                        std::thread::sleep(delays[n] / if n == 0 { 4 } else { 2 });
                        end(spawn(n, arguments), kills[n])
                    })
                })
                .collect();
            runs.into_iter().map(|run| run.join().unwrap()).collect()
        });
        let now = content(&to);
        let said: Vec<String> = outputs.iter().flatten().map(text).collect();
        let context = || format!("round {round}: {commands:?} {said:?}");
        assert!(is_known(&now), "{}", context());
        let is_ok = |n: usize| outputs[n].as_ref().is_some_and(|output| output.status.success());
        killed += outputs.iter().filter(|output| output.is_none()).count();
        let is_import = second[0] == "import";
        let goods: Vec<&Content> = [(is_ok(0), &one), (is_ok(1) && is_import, &two)]
            .into_iter()
            .filter_map(|(is_ok, content)| is_ok.then_some(content))
            .collect();
        succeeded[0] += usize::from(is_ok(0));
        succeeded[1] += usize::from(is_ok(1) && is_import);
        let all = |content: &Content| now == *content;
        if is_import && outputs.iter().any(Option::is_none) {
            // One that was killed may have replaced some of what another restored before.
            assert!(goods.is_empty() || now.len() == one.len(), "{}", context());
        } else if !goods.is_empty() {
            assert!(goods.iter().any(|good| all(good)), "{}", context());
        } else if outputs.iter().all(Option::is_some) {
            assert_eq!(now, before, "what fails changes nothing: {}", context());
        }
        if second[0] == "export" && is_ok(1) {
            archived += 1;
            let check = scene.fs.mount.join("check");
            let output = scene.run(&["import", "both.vmfold", "--to", "check"]);
            assert!(output.status.success(), "{} {}", text(&output), context());
            let restored = content(&check);
            assert!(is_known(&restored), "{}", context());
            std::fs::remove_dir_all(&check).unwrap();
        }
        let _ = std::fs::remove_file(scene.fs.mount.join("both.vmfold"));
    }
    assert!(
        succeeded.iter().all(|n| *n > 5) && killed > 20 && archived > 3,
        "{succeeded:?} ended well, {killed} were killed, {archived} archives were made"
    );
    // In the end, what was interrupted is gone on with, and nothing is left over.
    for archive in ["one.vmfold", "two.vmfold"] {
        let output = scene.run(&["import", archive, "--to", "to", "--replace", "--resume"]);
        assert!(output.status.success(), "{}", text(&output));
    }
    assert_eq!(content(&to), two);
    assert_eq!(sh(&format!("find {} -name '.vmfold*'", to.display())), "");
}

#[test]
fn whoever_opens_what_is_replaced_does_not_end_the_import() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let content = content(&scene.fs.pool());
    let paths: Vec<PathBuf> = NAMES.iter().map(|name| scene.fs.pool().join(name)).collect();
    let is_over = AtomicBool::new(false);
    let mut refused = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // As libvirt looks at images: it does not wait, but breaks the lease.
            while !is_over.load(Relaxed) {
                for path in &paths {
                    let _ = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
                }
            }
        });
        for _ in 0..60 {
            let output = scene.run(&[&WITH_SEED[..], &["--resume"]].concat());
            if !matches!(output.status.code(), Some(0 | 2))
                || output.status.code() == Some(2) && !text(&output).contains("in use")
            {
                is_over.store(true, Relaxed);
                panic!("{:?} {}", output.status, text(&output));
            }
            refused += u32::from(!output.status.success());
        }
        is_over.store(true, Relaxed);
    });
    assert!(refused > 0, "it was never noticed");
    let output = scene.run(&[&REPLACE[..], &["--resume"]].concat());
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(self::content(&scene.fs.pool()), content);
    assert_eq!(sh(&format!("find {} -name '.vmfold*'", scene.fs.pool().display())), "");
}
