//! Kills and power cuts at random moments, on real btrfs: no image changes, nothing is lost, and the next run goes on.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Random, can_mount, churn, population, reflink, sh, state_of, unmount, write_image};
use serde_json::Value;

/// A filesystem with reflinks that holds filesystems as files, so that one can be copied at one instant, in the middle of its work.
struct Nest {
    folder: tempfile::TempDir,
}

/// A filesystem in a nest, mounted.
struct Inner {
    image: PathBuf,
    mount: PathBuf,
}

impl Nest {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let nest = Self { folder };
        let path = nest.folder.path().display();
        std::fs::create_dir(nest.path("outer")).unwrap();
        sh(&format!(
            "truncate -s 6G {path}/outer.fs; mkfs.xfs -q {path}/outer.fs; mount -o loop {path}/outer.fs {path}/outer"
        ));
        nest
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn inner(&self, name: &str) -> Inner {
        let mount = self.path(name);
        std::fs::create_dir_all(&mount).unwrap();
        Inner {
            image: self.path("outer").join(name),
            mount,
        }
    }

    /// A new btrfs with a pool of images, unmounted.
    fn pristine(&self, seed: u64) -> Inner {
        let inner = self.inner("pristine");
        sh(&format!(
            "truncate -s 700M {0}; mkfs.btrfs -q {0} 2>&1",
            inner.image.display()
        ));
        inner.mount();
        let pool = inner.pool();
        std::fs::create_dir(&pool).unwrap();
        let mut random = Random(seed);
        let population = population(&mut random);
        for name in ["a.img", "b.img", "c.img"] {
            write_image(&pool.join(name), &mut random, &population, 10);
        }
        reflink(&pool.join("a.img"), &pool.join("a.img.1@2026-01-01T00:00:00Z"));
        churn(&pool.join("a.img"), &mut random, &population, 30);
        sh(&format!("sync -f {}", pool.display()));
        inner
    }

    /// A copy of a filesystem as it is at this instant, which a power cut would leave.
    fn copy(&self, of: &Inner, name: &str) -> Inner {
        let copy = self.inner(name);
        reflink(&of.image, &copy.image);
        copy
    }
}

impl Drop for Nest {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-q").arg(self.path("outer")).output();
    }
}

impl Inner {
    fn mount(&self) {
        sh(&format!(
            "mount -o loop {} {}",
            self.image.display(),
            self.mount.display()
        ));
    }

    fn pool(&self) -> PathBuf {
        self.mount.join("pool")
    }

    /// Starts vmfold in the folder that it is mounted on.
    fn start(&self, arguments: &[&str]) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmfold"));
        command.env_clear().current_dir(&self.mount).args(arguments);
        // An index on the filesystem is cut off with it; one beside it does not count in what is used.
        let index = if arguments[0] == "reclaim" {
            self.mount.with_extension("index")
        } else {
            "index".into()
        };
        command.arg("--index").arg(index);
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Runs it to its end, which must be a good one, and says how long that took.
    fn run(&self, arguments: &[&str]) -> Duration {
        let started = Instant::now();
        let output = self.start(arguments).wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        started.elapsed()
    }

    /// The images, by their names, with all that must stay as it is.
    fn state(&self) -> BTreeMap<PathBuf, String> {
        state_in(&self.pool())
    }

    fn used(&self) -> u64 {
        let mount = self.mount.display();
        let text = sh(&format!(
            "sync -f {mount}; btrfs filesystem sync {mount} >/dev/null; btrfs filesystem df -b {mount}"
        ));
        let data = text.lines().find(|line| line.starts_with("Data")).unwrap();
        data.split("used=").nth(1).unwrap().trim().parse().unwrap()
    }

    /// Unmounts it and checks that it is sound.
    fn check_and_remove(self) {
        unmount(&self.mount);
        sh(&format!("btrfs check {} 2>&1", self.image.display()));
        std::fs::remove_file(&self.image).unwrap();
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-q").arg(&self.mount).output();
    }
}

fn state_in(folder: &Path) -> BTreeMap<PathBuf, String> {
    let state = state_of(folder).into_iter();
    state
        .map(|(path, state)| (path.strip_prefix(folder).unwrap().to_owned(), state))
        .collect()
}

/// Content alone: an image that was restored is a new inode.
fn contents(state: &BTreeMap<PathBuf, String>) -> BTreeMap<&PathBuf, &str> {
    let digests = state
        .iter()
        .map(|(path, state)| (path, state.split(' ').next().unwrap()));
    digests.collect()
}

/// Kills a run after a time, and says whether it still ran.
fn kill_after(mut child: Child, time: Duration) -> bool {
    std::thread::sleep(time);
    let ran = child.try_wait().unwrap().is_none();
    let _ = child.kill();
    child.wait().unwrap();
    ran
}

/// The commits of an archive; none if it cannot be read.
fn commits(inner: &Inner, archive: &str) -> usize {
    let output = Command::new(env!("CARGO_BIN_EXE_vmfold"))
        .current_dir(&inner.mount)
        .args(["list", archive, "--json"])
        .output()
        .unwrap();
    let listed: Option<Value> = serde_json::from_slice(&output.stdout).ok();
    listed.map_or(0, |listed| listed["commits"].as_array().unwrap().len())
}

const RECLAIM: [&str; 6] = ["reclaim", "pool", "--work-space", "4M", "--min-run", "4K"];

const COMPRESS: [&str; 6] = ["reclaim", "pool", "--work-space", "4M", "--compress", "zstd"];

#[test]
fn reclaim_killed_200_times() {
    if can_mount() {
        killed(RECLAIM, 60, 200);
    }
}

#[test]
fn compression_killed_100_times() {
    if can_mount() {
        killed(COMPRESS, 66, 100);
    }
}

/// Kills runs at random moments.
fn killed(arguments: [&str; 6], seed: u64, times: u32) {
    let nest = Nest::new();
    let pristine = nest.pristine(seed);
    let (state, used) = (pristine.state(), pristine.used());
    unmount(&pristine.mount);
    let trial = nest.copy(&pristine, "trial");
    trial.mount();
    let takes = u64::try_from(trial.run(&arguments).as_micros()).unwrap();
    let goal = trial.used();
    trial.check_and_remove();
    assert!(goal < used);
    let (mut random, mut kills, mut round, mut within) = (Random(seed + 1), 0, 0, takes);
    while kills < times {
        let inner = nest.copy(&pristine, "killed");
        inner.mount();
        round += 1;
        assert!(round < 400, "{kills} kills in {round} rounds");
        // Some are killed again and again without an end.
        for _ in 0..=random.below(8) {
            let killed = kill_after(inner.start(&arguments), Duration::from_micros(random.below(within)));
            kills += u32::from(killed);
            // What was killed late has less left to do.
            within = if killed {
                takes.min(within * 5 / 4)
            } else {
                2000.max(within * 3 / 4)
            };
            assert!(inner.used() <= used, "a killed run leaves nothing behind");
        }
        assert_eq!(inner.state(), state, "after {kills} kills");
        if round % 8 == 0 {
            inner.run(&arguments);
            assert_eq!(inner.state(), state);
            assert!(inner.used() <= goal + goal / 100, "{} in place of {goal}", inner.used());
        }
        inner.check_and_remove();
    }
}

#[test]
fn reclaim_cut_off_50_times() {
    if can_mount() {
        cut_off(RECLAIM, 62, 50);
    }
}

#[test]
fn compression_cut_off_30_times() {
    if can_mount() {
        cut_off(COMPRESS, 68, 30);
    }
}

/// Takes copies of the filesystem at many moments of runs.
fn cut_off(arguments: [&str; 6], seed: u64, times: u32) {
    let nest = Nest::new();
    let pristine = nest.pristine(seed);
    let (state, used) = (pristine.state(), pristine.used());
    unmount(&pristine.mount);
    let (mut cuts, mut between) = (0, 0);
    // How many are in the middle depends on how fast a run is.
    while cuts < times || (between <= times / 10 && cuts < 20 * times) {
        let inner = nest.copy(&pristine, "cut");
        inner.mount();
        let mut child = inner.start(&arguments);
        let mut copies = Vec::new();
        while child.try_wait().unwrap().is_none() {
            copies.push(nest.copy(&inner, &format!("copy{}", copies.len())));
            std::thread::sleep(Duration::from_millis(15));
        }
        assert!(child.wait().unwrap().success());
        let goal = inner.used();
        inner.check_and_remove();
        for copy in copies {
            copy.mount();
            assert_eq!(copy.state(), state, "after {cuts} power cuts");
            let left = copy.used();
            assert!(left <= used, "a power cut leaves nothing behind");
            between += u32::from(left > goal && left < used);
            if cuts % 10 == 0 {
                copy.run(&arguments);
                assert_eq!(copy.state(), state);
            }
            copy.check_and_remove();
            cuts += 1;
        }
    }
    assert!(between > times / 10, "{between} of {cuts} cuts were in the middle");
}

#[test]
fn what_the_index_knows_of_a_copy_of_the_filesystem_is_not_believed() {
    if !can_mount() {
        return;
    }
    let nest = Nest::new();
    let pristine = nest.pristine(70);
    sh(&format!("rm {}/*", pristine.pool().display()));
    unmount(&pristine.mount);
    // Both copies write compressed extents at the same addresses in the same generation. Only those of the second hold duplicates.
    for (seeds, frees) in [([1, 2], false), ([3, 3], true)] {
        let copy = nest.copy(&pristine, "other");
        copy.mount();
        sh(&format!(
            "mount -o remount,compress-force=zstd {}",
            copy.mount.display()
        ));
        for (name, seed) in ["a.img", "b.img"].into_iter().zip(seeds) {
            let mut random = Random(seed);
            let blocks = (0..512).flat_map(|_| random.next().to_le_bytes().repeat(512));
            std::fs::write(copy.pool().join(name), blocks.collect::<Vec<u8>>()).unwrap();
        }
        let (state, used) = (copy.state(), copy.used());
        copy.run(&["reclaim", "pool"]);
        assert_eq!(copy.state(), state);
        assert_eq!(copy.used() < used, frees, "{} of {used}", copy.used());
        copy.check_and_remove();
    }
}

#[test]
fn export_and_import_cut_off_30_times() {
    if !can_mount() {
        return;
    }
    let nest = Nest::new();
    let pristine = nest.pristine(63);
    let state = pristine.state();
    pristine.run(&["export", "old.vmfold", "pool"]);
    churn(&pristine.pool().join("b.img"), &mut Random(64), &[vec![1; 4096]], 40);
    sh(&format!("sync -f {}", pristine.mount.display()));
    let changed = pristine.state();
    assert_ne!(changed, state);
    unmount(&pristine.mount);
    let cut_off = |name: &str, arguments: &[&str], look: &mut dyn FnMut(&Inner)| {
        let mut cuts = 0;
        while cuts < 30 {
            let inner = nest.copy(&pristine, name);
            inner.mount();
            let mut child = inner.start(arguments);
            let mut copies = Vec::new();
            while child.try_wait().unwrap().is_none() {
                copies.push(nest.copy(&inner, &format!("{name}{}", copies.len())));
                std::thread::sleep(Duration::from_millis(10));
            }
            assert!(child.wait().unwrap().success());
            inner.check_and_remove();
            for copy in copies {
                copy.mount();
                assert_eq!(copy.state(), changed, "images that exist are not touched");
                look(&copy);
                copy.check_and_remove();
                cuts += 1;
            }
        }
    };
    // An archive that is appended to has its old commit, or both; either way the next export goes on.
    let mut seen = [0; 3];
    cut_off("export", &["export", "old.vmfold", "pool"], &mut |copy| {
        let commits_then = commits(copy, "old.vmfold");
        assert!((1..=2).contains(&commits_then), "{commits_then} commits");
        seen[commits_then] += 1;
        if seen[commits_then] % 8 == 1 {
            copy.run(&["export", "old.vmfold", "pool"]);
            copy.run(&["import", "old.vmfold", "--to", "to"]);
            assert_eq!(contents(&state_in(&copy.mount.join("to"))), contents(&changed));
            copy.run(&["import", "old.vmfold", "--to", "first", "--commit", "1"]);
            assert_eq!(contents(&state_in(&copy.mount.join("first"))), contents(&state));
        }
    });
    // Images that have their names are complete; --resume makes the rest.
    let expected = contents(&state);
    let mut round = 0;
    cut_off("import", &["import", "old.vmfold", "--to", "to"], &mut |copy| {
        let to = copy.mount.join("to");
        let all = if to.exists() { state_in(&to) } else { BTreeMap::new() };
        let is_named = |path: &&PathBuf| {
            !path
                .components()
                .any(|part| part.as_os_str().to_str().unwrap().starts_with('.'))
        };
        for path in all.keys().filter(is_named) {
            assert_eq!(contents(&all)[path], expected[path], "{path:?}");
        }
        round += 1;
        if round % 6 == 0 {
            copy.run(&["import", "old.vmfold", "--to", "to", "--resume"]);
            assert_eq!(contents(&state_in(&to)), expected);
        }
    });
}
