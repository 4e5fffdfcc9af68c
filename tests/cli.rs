//! Goal: what each command prints and how it ends stays as it is. Method: one snapshot for each outcome, of stdout, stderr and
//! exit code; sizes that depend on the filesystem's mood are not among them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test that cannot go on has failed"
)]

mod common;

use std::fs::File;
use std::path::Path;
use std::process::{Command, Output};

use common::{Mounted, Random, can_mount, reflink, sh};

/// All that a command says, with the scratch folder's name replaced.
fn outcome(output: &Output, folder: &Path) -> String {
    let me = format!("({})", std::process::id());
    let text = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes).replace(&folder.display().to_string(), "[folder]");
        // A report begins with the folder, which is shortened where it is long, as are the gaps.
        let text = match text.split_once(" (btrfs)  ") {
            Some((path, rest)) if !path.contains('\n') => {
                let (line, rest) = rest.split_once('\n').unwrap_or((rest, ""));
                format!("[pool] (btrfs)  {}\n{rest}", line.trim_start().replace("   ", "  "))
            }
            _ => text,
        };
        let index = folder.with_file_name("index").display().to_string();
        let text = text.replace(&index, "[index]");
        // Who holds an image in these tests is the test itself.
        let lines = text
            .split_inclusive('\n')
            .map(|line| match line.split_once("open in ") {
                Some((before, after)) if after.contains(&me) => format!("{before}open in [process]\n"),
                _ => line.to_owned(),
            });
        lines.collect::<String>()
    };
    let code = output
        .status
        .code()
        .map_or("killed".to_owned(), |code| code.to_string());
    format!(
        "{}--- stderr\n{}--- exit {code}",
        text(&output.stdout),
        text(&output.stderr)
    )
}

fn vmfold(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vmfold"))
        .env_clear()
        .args(arguments)
        .output()
        .unwrap()
}

/// Two copies of the same data and a revision of one.
fn small_pool() -> Mounted {
    let fs = Mounted::new("mkfs.btrfs -q", "", 512);
    let (one, two) = (fs.pool().join("one.img"), fs.pool().join("two.img"));
    let mut content = Random(1).data(4 << 20);
    content.extend(vec![0; 1 << 20]);
    for path in [&one, &two] {
        std::fs::write(path, &content).unwrap();
        sh(&format!("sync -f {}", path.display()));
    }
    reflink(&two, &fs.pool().join("two.img.1@2026-01-01T00:00:00Z"));
    fs
}

#[test]
fn reclaim_report_scan_and_status() {
    if !can_mount() {
        return;
    }
    let fs = small_pool();
    let run = |command: &str| outcome(&fs.vmfold(command), &fs.mount);
    insta::assert_snapshot!(run("report"), @r#"
        [pool] (btrfs)  10.0 MiB on disk  3 images, 2 machines, none in use

        Reclaim would free 6.0 MiB (60 %), leaving 4.0. Deletes nothing.
          duplicates        4.0 ███████████████████▏
          zeros             2.0 █████████▌

                                                                    Deleting it frees
        Family / machine, MiB                      On disk          now   after reclaim
        one.img family                                10.0         10.0             4.0
          one.img                                      5.0          5.0               0
          two.img                                      5.0          5.0               0
            1 revision                                 5.0            0               0
        Deleting revisions gains nothing: keep them.
        Next: sudo vmfold reclaim --index [index] [folder]/pool
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run("scan"), @r#"
        3 images: 10.0 MiB on disk for 15.0 MiB mapped, 15.0 MiB with holes (2 extents, 3 references)
        Fingerprints: 10.0 MiB from the filesystem's checksums, 0 B from the index, 0 B read
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run("reclaim --dry-run"), @r#"
        Would free 6.0 MiB. Nothing was changed
        3 images: 10.0 MiB on disk for 15.0 MiB mapped, 15.0 MiB with holes (2 extents, 3 references)
        In 2 extents: duplicates 4.0 MiB, zeros 2.0 MiB
        To do so: 15.0 MiB compared, 4.0 MiB rewritten, about 768 B of metadata, up to 4.0 MiB of extra space on the way
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run("reclaim"), @r#"
        Freed 6.0 MiB: now 4.0 MiB on disk for 12.0 MiB mapped, 15.0 MiB with holes (1 extent, 3 references)
        3 images, before: 10.0 MiB on disk for 15.0 MiB mapped, 15.0 MiB with holes (2 extents, 3 references)
        Planned 6.0 MiB in 2 extents: duplicates 4.0 MiB, zeros 2.0 MiB
        To do so: 15.0 MiB compared, 4.0 MiB rewritten, about 768 B of metadata, up to 4.0 MiB of extra space on the way
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run("reclaim"), @r#"
        Freed 0 B: now 4.0 MiB on disk for 12.0 MiB mapped, 15.0 MiB with holes (1 extent, 3 references)
        3 images, before: 4.0 MiB on disk for 12.0 MiB mapped, 15.0 MiB with holes (1 extent, 3 references)
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run("report"), @r#"
        [pool] (btrfs)  4.0 MiB on disk  3 images, 2 machines, none in use

        Reclaim would free nothing: what is equal is shared already.

                                                                    Deleting it frees
        Family / machine, MiB                      On disk          now   after reclaim
        one.img family                                 4.0          4.0             4.0
          one.img                                      4.0            0               0
          two.img                                      4.0            0               0
            1 revision                                 4.0            0               0
        Deleting revisions gains nothing: keep them.
        Next, after updates of the machines: sudo vmfold reclaim --index [index] [folder]/pool
        --- stderr
        --- exit 0
    "#);
    let index = fs.index();
    let status = vmfold(&["status", "--index", &index.display().to_string()]);
    let status = outcome(&status, index.parent().unwrap());
    insta::with_settings!({filters => vec![(r"[\d.]+ [KM]iB on disk", "[size] on disk"), (r"[0-9a-f]{32}", "[uuid]")]}, {
        insta::assert_snapshot!(status, @r#"
            [folder]/index/[uuid]
              3 extents, 14.0 MiB of blocks, 0 B of them with fingerprints that had to be read
              802 chunks, about 384 different
              [size] on disk (extents-v2-crc32c-1-4-16-cuts-v1)
            --- stderr
            --- exit 0
        "#);
    });
    let open = File::open(fs.pool().join("one.img")).unwrap();
    insta::assert_snapshot!(run("reclaim --dry-run"), @r#"
        Would free 0 B. Nothing was changed
        2 images: 4.0 MiB on disk for 8.0 MiB mapped, 10.0 MiB with holes (1 extent, 2 references)
        1 image in use left alone (one.img): open in [process]
        --- stderr
        --- exit 3
    "#);
    drop(open);
}

#[test]
fn compression() {
    if !can_mount() {
        return;
    }
    let fs = small_pool();
    let run = |command: &str| outcome(&fs.vmfold(command), &fs.mount);
    insta::assert_snapshot!(run("reclaim --compress zstd --dry-run"), @r#"
        Would free 7.9 MiB. Nothing was changed
        3 images: 10.0 MiB on disk for 15.0 MiB mapped, 15.0 MiB with holes (2 extents, 3 references)
        In 2 extents: duplicates 4.0 MiB, zeros 2.0 MiB, compression 1.9 MiB
        To do so: 15.0 MiB compared, 2.1 MiB rewritten, about 24.0 KiB of metadata, up to 2.1 MiB of extra space on the way
        Of what is rewritten, 4.0 MiB of data are compressed to about 2.1 MiB
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run("reclaim --compress zstd"), @r#"
        Freed 7.9 MiB: now 2.1 MiB on disk for 12.0 MiB mapped, 15.0 MiB with holes (32 extents, 96 references), 2.1 MiB of it compressed from 4.0 MiB
        3 images, before: 10.0 MiB on disk for 15.0 MiB mapped, 15.0 MiB with holes (2 extents, 3 references)
        Planned 7.9 MiB in 2 extents: duplicates 4.0 MiB, zeros 2.0 MiB, compression 1.9 MiB
        To do so: 15.0 MiB compared, 2.1 MiB rewritten, about 24.0 KiB of metadata, up to 2.1 MiB of extra space on the way
        Of what is rewritten, 4.0 MiB of data are compressed to about 2.1 MiB
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run("reclaim --compress zstd"), @r#"
        Freed 0 B: now 2.1 MiB on disk for 12.0 MiB mapped, 15.0 MiB with holes (32 extents, 96 references), 2.1 MiB of it compressed from 4.0 MiB
        3 images, before: 2.1 MiB on disk for 12.0 MiB mapped, 15.0 MiB with holes (32 extents, 96 references), 2.1 MiB of it compressed from 4.0 MiB
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run("report"), @r#"
        [pool] (btrfs)  2.1 MiB on disk  3 images, 2 machines, none in use
        Compressed: 2.1 MiB on disk for 4.0 MiB

        Reclaim would free nothing: what is equal is shared already.

                                                                    Deleting it frees
        Family / machine, MiB                      On disk          now   after reclaim
        one.img family                                 2.1          2.1             2.1
          one.img                                      2.1            0               0
          two.img                                      2.1            0               0
            1 revision                                 2.1            0               0
        Deleting revisions gains nothing: keep them.
        Next, after updates of the machines: sudo vmfold reclaim --index [index] [folder]/pool
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run("reclaim --compress none --dry-run"), @r#"
        Would take more: 1.9 MiB. Nothing was changed
        3 images: 2.1 MiB on disk for 12.0 MiB mapped, 15.0 MiB with holes (32 extents, 96 references), 2.1 MiB of it compressed from 4.0 MiB
        To do so: 12.0 MiB compared, 4.0 MiB rewritten, about 0 B of metadata, up to 4.0 MiB of extra space on the way
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run("reclaim --compress none"), @r#"
        Took more: 1.9 MiB: now 4.0 MiB on disk for 12.0 MiB mapped, 15.0 MiB with holes (1 extent, 3 references)
        3 images, before: 2.1 MiB on disk for 12.0 MiB mapped, 15.0 MiB with holes (32 extents, 96 references), 2.1 MiB of it compressed from 4.0 MiB
        To do so: 12.0 MiB compared, 4.0 MiB rewritten, about 0 B of metadata, up to 4.0 MiB of extra space on the way
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run("reclaim --compress lzo"), @r#"
        --- stderr
        error: invalid value 'lzo' for '--compress <HOW>': it is `zstd`, `zstd:LEVEL` or `none`

        For more information, try '--help'.
        --- exit 2
    "#);
}

#[test]
fn reclaim_json() {
    if !can_mount() {
        return;
    }
    let fs = small_pool();
    insta::assert_snapshot!(outcome(&fs.vmfold("--json reclaim"), &fs.mount), @r#"
        {
          "type": "reclaim",
          "version": 1,
          "image_count": 3,
          "images": 3,
          "skipped": [],
          "machines_in_use": 0,
          "dry_run": false,
          "interrupted": false,
          "out_of_time": false,
          "pool": {
            "logical_bytes": 15728640,
            "referenced_bytes": 15728640,
            "physical_bytes": 10485760,
            "compressed_bytes": 0,
            "uncompressed_bytes": 0,
            "extents": 2,
            "references": 3
          },
          "fingerprinted": {
            "from_checksums": 10485760,
            "from_index": 0,
            "read": 0
          },
          "inline_images": 0,
          "unchecksummed_images": 0,
          "planned": {
            "freed_bytes": 6291456,
            "freed_by_reason": {
              "duplicate": 4194304,
              "zeros": 2097152
            },
            "rewritten_bytes": 4194304,
            "uncompressed_bytes": 0,
            "compressed_bytes": 0,
            "metadata_bytes": 768,
            "peak_bytes": 4194304,
            "compared_bytes": 15728640,
            "proved_bytes": 8192,
            "extents": 2,
            "sampled": 1,
            "pinned": {}
          },
          "done": {
            "freed_bytes": 6291456,
            "after": {
              "logical_bytes": 15728640,
              "referenced_bytes": 12582912,
              "physical_bytes": 4194304,
              "compressed_bytes": 0,
              "uncompressed_bytes": 0,
              "extents": 1,
              "references": 3
            },
            "counts": {
              "calls": 6,
              "shared_bytes": 15728640,
              "differing_bytes": 0,
              "refused_bytes": {},
              "written_bytes": 4194304,
              "abandoned_bytes": 0,
              "second_round_extents": 0,
              "extents_still_held": 0
            }
          },
          "held_by": {}
        }
        --- stderr
        --- exit 0
    "#);
}

#[test]
#[expect(clippy::too_many_lines, reason = "one outcome after the other")]
fn export_list_verify_diff_and_import() {
    if !can_mount() {
        return;
    }
    let fs = small_pool();
    let (archive, index) = (fs.mount.join("a.vmfold"), fs.index());
    let (archive, index) = (archive.to_str().unwrap(), index.to_str().unwrap());
    let (pool, to) = (fs.pool(), fs.mount.join("to"));
    let (pool, to) = (pool.to_str().unwrap(), to.to_str().unwrap());
    let run = |arguments: &[&str]| outcome(&vmfold(arguments), &fs.mount);
    let mut settings = insta::Settings::clone_current();
    for (what, name) in [
        (r"\([0-9a-f]{8}\)", "([name])"),
        (r"  [0-9a-f]{8}  ", "  [name]    "),
        (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", "[time]                 "),
        (r"[0-9.]+ MiB free", "[size] free"),
        // A COMMIT holds times, so that it compresses to a few bytes more or less.
        (r"stored in \d\.\d KiB", "stored in [few] KiB"),
        (r"  \d\.\d KiB", "  [few] KiB"),
        (r"(amaged:? (at )?)bytes \d+\.\.\d+", "${1}[range]"),
    ] {
        settings.add_filter(what, name);
    }
    let _bound = settings.bind_to_scope();
    insta::assert_snapshot!(run(&["export", archive, pool, "--index", index, "--label", "first"]), @r#"
        Commit 1 ([name]) of `[folder]/a.vmfold`: 3 images, 12.0 MiB of data in 15.0 MiB
        Read 10.0 MiB, 0 B known from before; 4.0 MiB new, stored in 2.1 MiB; the archive has 2.1 MiB
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run(&["export", archive, pool, "--index", index]), @r#"
        Commit 2 ([name]) of `[folder]/a.vmfold`: 3 images, 12.0 MiB of data in 15.0 MiB
        Read 0 B, 10.0 MiB known from before; 0 B new, stored in [few] KiB; the archive has 2.1 MiB
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run(&["list", archive]), @r#"
        `[folder]/a.vmfold`: 2 commits in 2.1 MiB
        Commit  Name      Time                     Images         Size        Added       Stored  Label
             1  [name]    [time]                        3     15.0 MiB      4.0 MiB      2.1 MiB  first
             2  [name]    [time]                        3     15.0 MiB          0 B      [few] KiB  
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run(&["list", archive, "first"]), @r#"
        `[folder]/a.vmfold`: 2 commits in 2.1 MiB
        Commit  Name      Time                     Images         Size        Added       Stored  Label
             1  [name]    [time]                        3     15.0 MiB      4.0 MiB      2.1 MiB  first

               Size        Data       Added  Image
            5.0 MiB     4.0 MiB     4.0 MiB  one.img
            5.0 MiB     4.0 MiB         0 B  two.img
            5.0 MiB     4.0 MiB         0 B  two.img.1@2026-01-01T00:00:00Z
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run(&["list", archive, "third"]), @r#"
        --- stderr
        error: the archive `[folder]/a.vmfold` has no commit `third` (vmfold list shows what there is)
        --- exit 2
    "#);
    insta::assert_snapshot!(run(&["verify", archive]), @r#"
        2 commits with 6 images, 4.0 MiB of blocks in 2.1 MiB: all intact
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run(&["import", archive, "--to", to, "--dry-run"]), @r#"
        Would restore 3 images to `[folder]/to`: 4.0 MiB written, 0 B shared with what is there
        Commit 2 ([name]) of `[folder]/a.vmfold`: 3 images, 12.0 MiB of data in 15.0 MiB
        4.0 MiB distinct: 4.0 MiB new, 0 B on this disk already; takes up to 4.0 MiB, [size] free
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run(&["import", archive, "two.img", "--to", to]), @r#"
        Restored 1 image to `[folder]/to`: 4.0 MiB written, 0 B shared with what was there
        Commit 2 ([name]) of `[folder]/a.vmfold`: 1 image, 4.0 MiB of data in 5.0 MiB
        4.0 MiB distinct: 4.0 MiB new, 0 B on this disk already; takes up to 4.0 MiB, [size] free
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run(&["import", archive, "two.img", "--to", to]), @r#"
        --- stderr
        error: exists already: `[folder]/to/two.img` (restore to another folder, or replace them with --replace)
        --- exit 2
    "#);
    insta::assert_snapshot!(run(&["import", archive, "none.img", "--to", to]), @r#"
        --- stderr
        error: no image of commit 2 ([name]) matches (vmfold list shows what there is)
        --- exit 2
    "#);
    std::fs::write(fs.pool().join("one.img"), vec![7; 5000]).unwrap();
    insta::assert_snapshot!(run(&["diff", archive, "1", "2"]), @r#"
        3 of 3 images are the same in commit 1 ([name]) and commit 2 ([name])
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run(&["diff", archive, "--pool", pool]), @r#"
        2 of 3 images are the same in commit 2 ([name]) and the images on disk
        Differs in 5.0 MiB: one.img: bytes 0..5242880
        --- stderr
        --- exit 5
    "#);
    let mut bytes = std::fs::read(archive).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    std::fs::write(archive, bytes).unwrap();
    insta::assert_snapshot!(run(&["verify", archive]), @r#"
        2 commits with 6 images, 3.0 MiB of blocks in 2.1 MiB: damaged
        Damaged: [range]: a record does not match its hash
        Damaged: [range]: a frame does not match its hash
        Commit 1: Lost: one.img: bytes 2129920..3186688
        Commit 1: Lost: two.img: bytes 2129920..3186688
        Commit 1: Lost: two.img.1@2026-01-01T00:00:00Z: bytes 2129920..3186688
        Commit 2: Lost: one.img: bytes 2129920..3186688
        Commit 2: Lost: two.img: bytes 2129920..3186688
        Commit 2: Lost: two.img.1@2026-01-01T00:00:00Z: bytes 2129920..3186688
        --- stderr
        --- exit 4
    "#);
    let whole = fs.mount.join("whole");
    insta::assert_snapshot!(run(&["import", archive, "--to", whole.to_str().unwrap()]), @r#"
        Nothing was restored: --partial restores what is intact
        Commit 2 ([name]) of `[folder]/a.vmfold`: 3 images, 12.0 MiB of data in 15.0 MiB
        4.0 MiB distinct: 4.0 MiB new, 0 B on this disk already; takes up to 4.0 MiB, [size] free
        Lost: one.img: bytes 2129920..3186688
        Lost: two.img: bytes 2129920..3186688
        Lost: two.img.1@2026-01-01T00:00:00Z: bytes 2129920..3186688
        --- stderr
        note: the archive `[folder]/a.vmfold` is damaged at [range]: a frame does not match its hash
        --- exit 4
    "#);
    insta::assert_snapshot!(run(&["import", archive, "--to", whole.to_str().unwrap(), "--partial"]), @r#"
        Restored 0 images to `[folder]/whole`: 3.0 MiB written, 0 B shared with what was there
        Commit 2 ([name]) of `[folder]/a.vmfold`: 3 images, 12.0 MiB of data in 15.0 MiB
        4.0 MiB distinct: 4.0 MiB new, 0 B on this disk already; takes up to 4.0 MiB, [size] free
        Lost: one.img: bytes 2129920..3186688; the rest of it is `one.img.vmfold-partial`
        Lost: two.img: bytes 2129920..3186688; the rest of it is `two.img.vmfold-partial`
        Lost: two.img.1@2026-01-01T00:00:00Z: bytes 2129920..3186688; the rest of it is `two.img.1@2026-01-01T00:00:00Z.vmfold-partial`
        --- stderr
        note: The archive is damaged at [range]: a record does not match its hash
        note: the archive `[folder]/a.vmfold` is damaged at [range]: a frame does not match its hash
        --- exit 4
    "#);
}

#[test]
fn json_is_as_its_schema_says() {
    if !can_mount() {
        return;
    }
    let schema: serde_json::Value = serde_json::from_str(include_str!("../formats/report-v1.schema.json")).unwrap();
    let schema = jsonschema::validator_for(&schema).unwrap();
    let fs = small_pool();
    let open = File::open(fs.pool().join("one.img")).unwrap();
    let status = vmfold(&["--json", "status", "--index", &fs.index().display().to_string()]);
    let mut documents = vec![serde_json::from_slice(&status.stdout).unwrap()];
    for command in ["report", "scan", "reclaim --dry-run", "reclaim"] {
        documents.push(fs.vmfold_json(command));
    }
    drop(open);
    documents.push(fs.vmfold_json("reclaim"));
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name).display().to_string();
    let (archive, index, pool) = (at("a.vmfold"), at("index"), fs.pool().display().to_string());
    for arguments in [
        vec!["export", &archive, "--index", &index, &pool],
        vec!["list", &archive],
        vec!["verify", &archive],
        vec!["protect", &archive],
        vec!["protect", &archive],
        vec!["verify", &archive],
        vec!["repair", &archive, "--dry-run"],
        vec!["repair", &archive, "--to", &at("copy")],
        vec!["diff", &archive, "--pool", &pool],
        vec!["import", &archive, "--index", &index, "--to", &at("to"), "--dry-run"],
        vec!["import", &archive, "--index", &index, "--to", &at("to")],
    ] {
        documents.push(serde_json::from_slice(&vmfold(&[&["--json"], &arguments[..]].concat()).stdout).unwrap());
    }
    let man = vmfold(&["--json", "man", &scratch.path().display().to_string()]);
    documents.push(serde_json::from_slice(&man.stdout).unwrap());
    std::fs::OpenOptions::new()
        .append(true)
        .open(&archive)
        .unwrap()
        .set_len(5000)
        .unwrap();
    documents.push(serde_json::from_slice(&vmfold(&["--json", "verify", &archive]).stdout).unwrap());
    for document in &documents {
        let problems: Vec<_> = schema.iter_errors(document).map(|error| error.to_string()).collect();
        assert!(problems.is_empty(), "{problems:?} in {document}");
    }
    let mut wrong = documents[5].clone();
    wrong["planned"]["freed_bytes"] = "much".into();
    assert!(!schema.is_valid(&wrong), "a schema that accepts everything is none");
}

#[test]
fn bad_input_is_one_line_each() {
    if !can_mount() {
        return;
    }
    let (fs, other) = (small_pool(), Mounted::btrfs());
    let xfs = Mounted::new("mkfs.xfs -q -m reflink=0,rmapbt=0", "", 512);
    let index = fs.index().display().to_string();
    let run = |arguments: &[&str]| {
        let mut all = vec!["reclaim", "--index", &index];
        all.extend(arguments);
        let output = vmfold(&all);
        assert_eq!(String::from_utf8_lossy(&output.stderr).lines().count(), 1);
        let text = outcome(&output, &fs.mount);
        let text = text.replace(&other.mount.display().to_string(), "[other]");
        text.replace(&xfs.mount.display().to_string(), "[xfs]")
    };
    let (pool, elsewhere) = (fs.pool().display().to_string(), other.pool().display().to_string());
    std::fs::write(xfs.pool().join("a.img"), "x").unwrap();
    std::fs::write(other.pool().join("a.img"), "x").unwrap();
    insta::assert_snapshot!(run(&[&format!("{pool}/absent")]), @r#"
        --- stderr
        error: `[folder]/pool/absent` does not exist (check the path)
        --- exit 2
    "#);
    std::fs::create_dir(fs.mount.join("nothing")).unwrap();
    insta::assert_snapshot!(run(&[&fs.mount.join("nothing").display().to_string()]), @r#"
        --- stderr
        error: no images found in `[folder]/nothing` (name image files, or folders that hold .img, .raw, .qcow2, .vmdk, .vdi or .vhdx files and their revisions)
        --- exit 2
    "#);
    let pipe = fs.mount.join("pipe.img").display().to_string();
    sh(&format!("mkfifo {pipe}"));
    insta::assert_snapshot!(run(&[&pool, &pipe]), @r#"
        --- stderr
        error: `[folder]/pipe.img` is neither a file nor a folder (name image files and folders)
        --- exit 2
    "#);
    insta::assert_snapshot!(run(&[&pool, &elsewhere]), @r#"
        --- stderr
        error: `[folder]/pool` and `[other]/pool` are on two filesystems (run once for each filesystem)
        --- exit 2
    "#);
    insta::assert_snapshot!(run(&[&xfs.pool().display().to_string()]), @r#"
        --- stderr
        error: `[xfs]/pool` is on an XFS without reflinks (blocks can be shared on an XFS that was made with mkfs.xfs -m reflink=1 only)
        --- exit 1
    "#);
    insta::assert_snapshot!(run(&["--min-run", "0", &pool]), @r#"
        --- stderr
        error: --min-run must be between 4K and 4G
        --- exit 2
    "#);
    insta::assert_snapshot!(run(&["--exclude", "[", &pool]), @r#"
        --- stderr
        error: `[` is no pattern: error parsing glob '[': unclosed character class; missing ']'
        --- exit 2
    "#);
    let uuid = sh(&format!("findmnt -no UUID {}", fs.mount.display()))
        .trim()
        .replace('-', "");
    std::fs::create_dir_all("/run/vmfold").unwrap();
    let lock = File::create(Path::new("/run/vmfold").join(uuid)).unwrap();
    lock.lock_shared().unwrap();
    insta::assert_snapshot!(run(&[&pool]), @r#"
        --- stderr
        error: another vmfold is working on the filesystem of `[folder]/pool` (wait until it has ended)
        --- exit 1
    "#);
    drop(lock);
    sh(&format!("mount -o remount,ro {}", fs.mount.display()));
    insta::assert_snapshot!(run(&[&pool]), @r#"
        --- stderr
        error: `[folder]/pool` is on a filesystem that is mounted read-only (remount it read-write, or use --dry-run or report)
        --- exit 1
    "#);
    sh(&format!("mount -o remount,rw {}", fs.mount.display()));
    let binary = tempfile::tempdir().unwrap();
    let copy = binary.path().join("vmfold");
    std::fs::copy(env!("CARGO_BIN_EXE_vmfold"), &copy).unwrap();
    sh(&format!(
        "chmod 755 {0} {1} {2} {3}",
        binary.path().display(),
        copy.display(),
        fs.mount.parent().unwrap().display(),
        fs.mount.display()
    ));
    sh(&format!("chmod 755 {pool}/../pool 2>/dev/null || true"));
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--clear-groups"])
        .arg(&copy)
        .args(["reclaim", "--index", "/tmp", &pool])
        .output()
        .unwrap();
    insta::assert_snapshot!(outcome(&output, &fs.mount), @r#"
        --- stderr
        error: reading the filesystem's extent maps takes root (run it with sudo)
        --- exit 1
    "#);
}

/// A help text, without the blanks at the ends of its lines.
fn help(arguments: &[&str]) -> String {
    let text = outcome(&vmfold(arguments), Path::new("/none"));
    let lines = text.lines().map(str::trim_end);
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn help_and_usage() {
    insta::assert_snapshot!(help(&["--help"]), @r#"
        Gives virtual machine images their disk back: what images and revisions have in common becomes
        shared extents

        vmfold works on the images of machines that are shut down, on btrfs and on XFS with reflinks. It
        shares what images have in common, frees the rest, and keeps images in archives. Images keep every
        byte, their times, inodes, links, mode and owner. An image that someone has open is left alone and
        named. On btrfs it takes root.

        Exit codes: 0 done; 1 failed; 2 wrong usage; 3 done, but some images were left alone or the time was
        over; 4 the archive is damaged; 5 diff found differences; 130 interrupted. What each means for each
        command stands in `formats/scripting.md`.

        Sizes are bytes, or have a unit: 16K and 16KiB are 16384 bytes, 16KB are 16000. Patterns are globs
        as in a shell: `*` stands for any text, also across slashes, and `?` for one character. A pattern
        without a slash holds at any depth. Quote patterns, or the shell expands them.

        Usage: vmfold [OPTIONS] <COMMAND>

        Commands:
          reclaim  Share what images have in common, and free the rest
          report   Tell what takes space, what a reclaim would free, and what deleting would free
          export   Write images and revisions to an archive, each distinct block once
          import   Restore images from an archive or another backup, sharing what they have in common
          list     Show the commits and images of an archive
          verify   Check every hash and reference of an archive
          protect  Give an archive parity, from which lost bytes of it can be computed
          key      List, add, remove and rotate the keys of an encrypted archive, and print one on paper
          repair   Heal a damaged archive from its parity
          diff     Show what differs between two commits, or between one and images on disk
          scan     Fill the index only
          status   Show what the index knows
          help     Print this message or the help of the given subcommand(s)

        Options:
              --json
                  Print one JSON document instead of text

                  The document goes to standard output when the command has ended, and has the form of
                  `formats/report-v1.schema.json`. `export -` prints it to standard error, since the archive
                  goes to standard output. `--qubes` prints one document for each filesystem.

              --nice
                  Give way to all other work on the processor and the disk

                  vmfold runs in the idle classes of the scheduler and of the disk. It leaves them for as
                  long as somebody waits for an image it holds.

          -v, --verbose...
                  Say on standard error what is decided about each image, and with -vv about each range

                  Once: which images are worked on, which are left alone and why, what is planned, what
                  names restored images get. Twice: also each range that is not shared or cannot be read,
                  with the reason, and each extent that goes.

          -q, --quiet
                  Print only the first line of a report, and neither notes nor progress

                  Errors are printed all the same. It is for timers, which mail what is printed. It changes
                  no JSON document.

              --log-file <FILE>
                  Append a log of all decisions to a file

                  The file gets what -vv says, with times, and the notes. It is made if it does not exist,
                  for its user alone. A file that belongs to another user, and a link, are refused.

              --log-json
                  Write the lines of -v and --log-file as JSON

                  Each line is one object, with the level, the message, and what it is about.

          -h, --help
                  Print help (see a summary with '-h')

          -V, --version
                  Print version
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(outcome(&vmfold(&["reclaim"]), Path::new("/none")), @r#"
        --- stderr
        error: the following required arguments were not provided:
          <PATH>...

        Usage: vmfold reclaim <PATH>...

        For more information, try '--help'.
        --- exit 2
    "#);
    insta::assert_snapshot!(outcome(&vmfold(&["status", "--index", "/nonexistent"]), Path::new("/none")), @r#"
        --- stderr
        note: There is no index in `[folder]xistent` yet: run vmfold scan or reclaim
        --- exit 0
    "#);
}

/// The long options that a help text explains, each at the beginning of a line.
fn long_options(help: &str) -> Vec<&str> {
    let words = help.lines().filter_map(|line| {
        let line = line.trim_start();
        let (short, after) = line.split_once(", ").unwrap_or(("", line));
        let is_short = short.is_empty() || short.len() == 2 && short.starts_with('-');
        is_short.then(|| after.split([' ', '.']).next().unwrap())
    });
    words.filter(|word| word.starts_with("--") && *word != "---").collect()
}

#[test]
fn man_pages_name_every_option() {
    use std::os::unix::fs::{MetadataExt, symlink};
    let folder = tempfile::tempdir().unwrap();
    let outside = folder.path().join("outside");
    std::fs::write(&outside, "untouched").unwrap();
    let pages = folder.path().join("man1");
    let write_pages = || outcome(&vmfold(&["man", pages.to_str().unwrap()]), folder.path());
    insta::assert_snapshot!(write_pages(), @r#"
    --- stderr
    error: `[folder]/man1` does not exist (check the path)
    --- exit 2
    "#);
    std::fs::create_dir(&pages).unwrap();
    symlink(&outside, pages.join("vmfold-list.1")).unwrap();
    std::fs::write(pages.join("vmfold-diff.1"), "an older page").unwrap();
    insta::assert_snapshot!(write_pages(), @r#"
        [folder]/man1/vmfold.1
        [folder]/man1/vmfold-reclaim.1
        [folder]/man1/vmfold-report.1
        [folder]/man1/vmfold-export.1
        [folder]/man1/vmfold-import.1
        [folder]/man1/vmfold-list.1
        [folder]/man1/vmfold-verify.1
        [folder]/man1/vmfold-protect.1
        [folder]/man1/vmfold-key.1
        [folder]/man1/vmfold-repair.1
        [folder]/man1/vmfold-diff.1
        [folder]/man1/vmfold-scan.1
        [folder]/man1/vmfold-status.1
        --- stderr
        --- exit 0
    "#);
    assert_eq!(std::fs::read_to_string(&outside).unwrap(), "untouched");
    let mut count = 0;
    for entry in std::fs::read_dir(&pages).unwrap() {
        let path = entry.unwrap().path();
        let state = std::fs::symlink_metadata(&path).unwrap();
        assert!(state.is_file() && state.mode() & 0o777 == 0o644, "{}", path.display());
        let name = path.file_name().unwrap().to_str().unwrap();
        let name = name.strip_prefix("vmfold").and_then(|name| name.strip_suffix(".1"));
        let verb = name.unwrap().strip_prefix('-').map(str::to_owned);
        let arguments: Vec<&str> = verb.as_deref().into_iter().chain(["--help"]).collect();
        let help = help(&arguments);
        let text = std::fs::read_to_string(&path).unwrap().replace("\\-", "-");
        let options = long_options(&help);
        count += options.len();
        for option in options {
            assert!(text.contains(option), "{option} is not in {}", path.display());
        }
    }
    assert!(count > 70, "only {count} options were found");
    std::fs::remove_file(pages.join("vmfold.1")).unwrap();
    std::fs::create_dir(pages.join("vmfold.1")).unwrap();
    insta::assert_snapshot!(write_pages(), @r#"
    --- stderr
    error: cannot write `[folder]/man1/vmfold.1`: Is a directory (os error 21)
    --- exit 1
    "#);
}

#[test]
fn short_help_of_reclaim() {
    insta::assert_snapshot!(help(&["reclaim", "-h"]), @r#"
        Share what images have in common, and free the rest

        Usage: vmfold reclaim [OPTIONS] [PATH]...

        Arguments:
          [PATH]...  Image files, and folders to search for images, all on one filesystem; or a whole
                     filesystem, by device or UUID

        Options:
              --files-from <FILE>   Read more paths from a file, one a line or ended by NUL; `-` for
                                    standard input
              --json                Print one JSON document instead of text
              --nice                Give way to all other work on the processor and the disk
              --qubes               All file-reflink pools of Qubes OS, by qubes.xml or qvm-pool
              --qubes-root <DIR>    Where dom0's root filesystem is mounted, in a rescue system [default: /]
          -v, --verbose...          Say on standard error what is decided about each image, and with -vv
                                    about each range
              --exclude <GLOB>      Leave out what matches this pattern; may be given more than once
          -q, --quiet               Print only the first line of a report, and neither notes nor progress
              --index <DIR>         Folder for the index, which is only a cache [default: /var/cache/vmfold]
              --log-file <FILE>     Append a log of all decisions to a file
              --log-json            Write the lines of -v and --log-file as JSON
              --memory <SIZE>       Memory for tables of blocks, and as much again for lists; 32 MiB, and 48
                                    MiB more for each TiB of extents, if not said
          -n, --dry-run             Only say what would be done
              --min-run <SIZE>      Shortest run of equal data worth sharing: less frees more, and makes
                                    more fragments [default: 8KiB]
              --compress <HOW>      Compress what gains by it, with `zstd` or `zstd:LEVEL` (1 to 19, 3 if
                                    not said), sharing it all the same; `none` undoes it
              --min-gain <PERCENT>  What must be gained to compress something, in hundredths of its size
                                    [default: 10]
              --recompress          Compress what is compressed already once more where that gains as much
                                    again
              --keep-zeros          Leave blocks of zeros as data instead of making them holes
              --keep-prealloc       Leave preallocated ranges allocated instead of making them holes
              --work-space <SIZE>   Extra disk space that may be used on the way [default: 1GiB]
              --group <GLOB>        Keep images that match this pattern among themselves; may be given more
                                    than once
              --max-references <N>  References that one extent may get [default: 16384]
              --max-extents <N>     References to extents that an image may get for each GiB of its data
                                    [default: 32768]
              --reserve <SIZE>      Disk space that stays free whatever happens [default: 128MiB]
              --max-seconds <N>     Stop in order after so many seconds; the next run goes on from there
              --ok-if-in-use        End with 0 if nothing but images in use was left alone
          -h, --help                Print help (see more with '--help')
          -V, --version             Print version
        --- stderr
        --- exit 0
    "#);
}

#[test]
#[expect(clippy::too_many_lines, reason = "the help is the reference")]
fn help_of_reclaim() {
    insta::assert_snapshot!(help(&["reclaim", "--help"]), @r#"
        Share what images have in common, and free the rest

        It frees blocks that are equal anywhere in any image, zeros, space that was allocated and never
        written, and parts of extents that nothing can reach. The kernel compares the bytes of both sides,
        under lock, before it shares them; nothing else touches an image. No image and no revision is
        deleted. vmfold counts extents before and after, and reports the difference as freed.

        Shut the machines down first, and name what is to share: images, folders, or a whole filesystem.
        Extents that snapshots or files outside these paths use too stay; vmfold says how much that is, and
        who holds them. It can be killed at any moment: images stay as they are, and the next run goes on
        from there.

        Usage: vmfold reclaim [OPTIONS] [PATH]...

        Arguments:
          [PATH]...
                  Image files, and folders to search for images, all on one filesystem; or a whole
                  filesystem, by device or UUID

                  A folder is searched at all depths, without following symbolic links. Images on other
                  filesystems that are mounted below it are left alone. In a folder, those files count whose
                  names say that they are images (.img, .raw, .qcow2, .qcow, .vmdk, .vdi, .vhd, .vhdx, .hdd,
                  .iso) or revisions of one, and files of 16 MiB and more without an extension. A file that
                  is named itself always counts. A whole filesystem with all its subvolumes is named by its
                  mount point, its device, or its UUID. Images share blocks only with others that are named
                  in the same run.

        Options:
              --files-from <FILE>
                  Read more paths from a file, one a line or ended by NUL; `-` for standard input

                  If there is a NUL in the file, each path ends with one; otherwise each line is a path.
                  Empty ones are skipped. A list may have 16 MiB.

              --json
                  Print one JSON document instead of text

                  The document goes to standard output when the command has ended, and has the form of
                  `formats/report-v1.schema.json`. `export -` prints it to standard error, since the archive
                  goes to standard output. `--qubes` prints one document for each filesystem.

              --nice
                  Give way to all other work on the processor and the disk

                  vmfold runs in the idle classes of the scheduler and of the disk. It leaves them for as
                  long as somebody waits for an image it holds.

              --qubes
                  All file-reflink pools of Qubes OS, by qubes.xml or qvm-pool

                  It takes the folders `appvms`, `vm-templates` and `vm-kernels` of each pool whose driver
                  is file-reflink. `reclaim` and `report` work on pools on different filesystems one after
                  the other; other commands refuse them.

              --qubes-root <DIR>
                  Where dom0's root filesystem is mounted, in a rescue system

                  qubes.xml and the folders of the pools are looked for below this folder.

                  [default: /]

          -v, --verbose...
                  Say on standard error what is decided about each image, and with -vv about each range

                  Once: which images are worked on, which are left alone and why, what is planned, what
                  names restored images get. Twice: also each range that is not shared or cannot be read,
                  with the reason, and each extent that goes.

              --exclude <GLOB>
                  Leave out what matches this pattern; may be given more than once

                  It holds for what is found in folders, by the path below the folder that was named or by
                  the full path. A folder that matches is not searched. A pattern without a slash holds at
                  any depth.

          -q, --quiet
                  Print only the first line of a report, and neither notes nor progress

                  Errors are printed all the same. It is for timers, which mail what is printed. It changes
                  no JSON document.

              --index <DIR>
                  Folder for the index, which is only a cache

                  It remembers what was read. Delete it at any time: the next run then reads more. What of a
                  large pool does not fit into memory lies in unnamed files here while vmfold runs. Nobody
                  else may be able to write to the folder. Where it cannot be used, the run goes on without
                  an index and says so.

                  [default: /var/cache/vmfold]

              --log-file <FILE>
                  Append a log of all decisions to a file

                  The file gets what -vv says, with times, and the notes. It is made if it does not exist,
                  for its user alone. A file that belongs to another user, and a link, are refused.

              --log-json
                  Write the lines of -v and --log-file as JSON

                  Each line is one object, with the level, the message, and what it is about.

              --memory <SIZE>
                  Memory for tables of blocks, and as much again for lists; 32 MiB, and 48 MiB more for each
                  TiB of extents, if not said

                  In all, vmfold takes at most twice this, 48 MiB more, and 32 MiB more for each TiB of
                  extents, whatever is in the pool.

                  A pool with more blocks keeps their fingerprints in a file beside the index. One with more
                  still looks up a sample of its blocks, from which matches grow in both directions; vmfold
                  says so, and names the sample. The rest of long lists lies in unnamed files beside the
                  index, which take a quarter of what is free there at most. The kernel keeps pages of these
                  files in memory while nobody else needs it.

          -n, --dry-run
                  Only say what would be done

                  It makes the whole plan and changes no image. Where the filesystem has checksums, that
                  takes seconds. It works on a filesystem that is mounted read-only, too. It also fills the
                  index.

              --min-run <SIZE>
                  Shortest run of equal data worth sharing: less frees more, and makes more fragments

                  The size holds where two revisions have the place. Half of it is enough where no revision
                  shares the place, and half as much again is needed where three or more do. 4K shares
                  whatever frees more than it takes of metadata, and makes most fragments. 64K or more makes
                  the fewest: reading, `cp --reflink` and `btrfs send` then cost the least, and somewhat
                  less is freed. It is 4K at least and 4G at most.

                  [default: 8KiB]

              --compress <HOW>
                  Compress what gains by it, with `zstd` or `zstd:LEVEL` (1 to 19, 3 if not said), sharing
                  it all the same; `none` undoes it

                  Each distinct extent is rewritten once, as zstd frames of up to 128 KiB that are made on
                  all cores. The kernel then moves every reference there, after it has compared the bytes.
                  `btrfs filesystem defragment -czstd` would copy the data of each image and each revision
                  for itself, and so undo all sharing on the way.

                  What does not shrink by --min-gain stays where it is: in each extent one part in eight is
                  tried before anything is rewritten, then each frame on its own. What is compressed already
                  stays too, unless --recompress is given. What guests write later is not compressed, unless
                  the filesystem is mounted so; the next run does it. `none` undoes all compression, if
                  there is room for that.

                  `btrfs property set IMAGE compression none` keeps an image as it is, and with it what it
                  shares. `chattr +m` does not: btrfs sets the same mark by itself on any file of which one
                  part did not shrink. Images without checksums (nodatacow) cannot be compressed, and
                  neither can any on XFS. Linux before 5.18 takes no frames: there btrfs compresses itself,
                  at its own level.

                  Use it for what is kept rather than run: revisions, templates, machines that are seldom
                  up, a disk that is too small. Leave it for machines that read at random a lot: to read 4
                  KiB, up to 128 KiB are decompressed. Levels cost time to compress, and none to read.

              --min-gain <PERCENT>
                  What must be gained to compress something, in hundredths of its size

                  Higher values leave more data uncompressed, which reads faster.

                  [default: 10]

              --recompress
                  Compress what is compressed already once more where that gains as much again

                  btrfs does not keep the level that something was compressed with. So it is tried, and goes
                  by what is gained: --min-gain, once more.

              --keep-zeros
                  Leave blocks of zeros as data instead of making them holes

                  A hole takes no space until the guest writes there again. With this option zeros stay as
                  data.

              --keep-prealloc
                  Leave preallocated ranges allocated instead of making them holes

                  A preallocated range is space that was reserved, as by `fallocate`, and never written.

              --work-space <SIZE>
                  Extra disk space that may be used on the way

                  Donors take it: files without names that blocks are copied to before what they replace is
                  freed. It rarely takes more than 256 MiB. With --compress, what less than that leaves may
                  take more than one run.

                  [default: 1GiB]

              --group <GLOB>
                  Keep images that match this pattern among themselves; may be given more than once

                  They share blocks with no others. Images that match no pattern share with each other. The
                  first pattern that matches an image, or a folder it lies in, counts; there may be 31
                  patterns. Extents that groups share already stay shared.

                  Sharing reveals something: a guest can in principle tell by the time a write takes that
                  one of its blocks was shared, and so that another guest has the same block. Groups keep
                  trust domains apart.

              --max-references <N>
                  References that one extent may get

                  `btrfs send` clones only extents that have 1024 references at most, counted over all
                  snapshots. Where each image lies in two snapshots, say 400 if you send them. With a lower
                  limit less is freed, and what is left may take more than one run.

                  [default: 16384]

              --max-extents <N>
                  References to extents that an image may get for each GiB of its data

                  The default is one for each 32 KiB on average. The limit keeps reading in order and `cp
                  --reflink` fast. Metadata is limited besides: no extent goes that would free less than its
                  new references take. Compressed extents are 128 KiB at most, so that there are 8192 to the
                  GiB at least, whatever this says. With --compress, what this limit leaves may take more
                  than one run.

                  [default: 32768]

              --reserve <SIZE>
                  Disk space that stays free whatever happens

                  No donor is written that would leave less. What would take more waits for the next run.

                  [default: 128MiB]

              --max-seconds <N>
                  Stop in order after so many seconds; the next run goes on from there

                  The call that is going on ends first. The exit code is then 3.

              --ok-if-in-use
                  End with 0 if nothing but images in use was left alone

                  It is for timers, to which a running machine is no failure. The images are told all the
                  same.

          -h, --help
                  Print help (see a summary with '-h')

          -V, --version
                  Print version
        --- stderr
        --- exit 0
    "#);
}

#[test]
#[expect(clippy::too_many_lines, reason = "one outcome after the other")]
fn an_encrypted_archive_opens_by_its_keys_and_heals_without() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::create_dir(folder.path().join("pool")).unwrap();
    std::fs::write(folder.path().join("pool/a.img"), Random(3).data(1 << 20)).unwrap();
    for (name, secret) in [("one", "correct horse"), ("two", "battery"), ("wrong", "staple")] {
        std::fs::write(folder.path().join(name), format!("{secret}\n")).unwrap();
    }
    let (archive, index) = (&path("a.vmfold"), &path("index"));
    let with = |name| format!("--passphrase-file={}", path(name));
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmfold"));
        command.env_clear().env("VMFOLD_STATE", path("state"));
        outcome(&command.args(arguments).output().unwrap(), folder.path())
    };
    let mut settings = insta::Settings::clone_current();
    for (what, name) in [
        (r"\([0-9a-f]{8}\)", "([name])"),
        (r"\d{4}-\d\d-\d\d", "[day]"),
        (r"[\d.]+ [KMG]iB", "[size]"),
        (r"bytes \d+\.\.\d+", "bytes [range]"),
    ] {
        settings.add_filter(what, name);
    }
    let _bound = settings.bind_to_scope();
    let pool = &path("pool");
    insta::assert_snapshot!(run(&["export", archive, pool, "--index", index, "--encrypt", "--parity", "10", &with("one")]), @r#"
        Commit 1 ([name]) of `[folder]/a.vmfold`: 1 image, [size] of data in [size]
        Read [size], 0 B known from before; [size] new, stored in [size]; the archive has [size]
        Parity: [size] of what was written
        --- stderr
        note: `[folder]/a.vmfold` has one key. If it is lost, everything in the archive is lost: nobody can restore it then. Add another key with vmfold key add, or print one with vmfold key sheet
        --- exit 0
    "#);
    insta::assert_snapshot!(run(&["list", archive]), @r#"
        --- stderr
        error: `[folder]/a.vmfold` is encrypted, and no key was given: it opens by a passphrase (give it by --passphrase-file, --passphrase-fd or --passphrase-command, or name the file of an identity by --identity)
        --- exit 2
    "#);
    insta::assert_snapshot!(run(&["list", archive, &with("wrong")]), @r#"
        --- stderr
        error: the key is wrong: `[folder]/a.vmfold` opens by a passphrase, and by none of what was given (check what was given; vmfold key list tells who holds a key)
        --- exit 1
    "#);
    insta::assert_snapshot!(run(&["verify", archive]), @r#"
        1 commit in [size], encrypted: every record is intact. What is in them was not verified, because no key was given
        Parity of 10 % for [size], none for [size]: nothing is lost there; [size] more would still heal, at any place
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run(&["verify", archive, &with("one")]), @r#"
        1 commit with 1 image, [size] of blocks in [size]: all intact
        Parity of 10 % for [size], none for [size]: nothing is lost there; [size] more would still heal, at any place
        --- stderr
        --- exit 0
    "#);
    let second = format!("--new-passphrase-file={}", path("two"));
    insta::assert_snapshot!(run(&["key", "add", archive, &second, "--label", "second", &with("one")]), @r#"
        Added key 2: a passphrase, `second`, added on [day]
        There are 2 keys now.
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run(&["key", "list", archive]), @r#"
        1: a passphrase
        2: a passphrase
        Give one of these keys to see what they are called
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run(&["key", "list", archive, &with("two")]), @r#"
        1: a passphrase, `passphrase`, added on [day]
        2: a passphrase, `second`, added on [day]
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run(&["key", "remove", archive, "1", &with("two")]), @r#"
        Removed key 1: a passphrase, `passphrase`, added on [day]
        Whoever had it can still read what is in the archive now, in any copy of it. If he kept what it opened, he can read what is exported later, too: vmfold key rotate ends that.
        There is one key now. If it is lost, everything in the archive is lost.
        --- stderr
        --- exit 0
    "#);
    let older = std::fs::read(archive).unwrap();
    insta::assert_snapshot!(run(&["key", "host", archive, "laptop", "--to", &path("laptop"), &with("two")]), @r#"
        Made credentials of the host `laptop`. With them, it adds to the archive by vmfold export --write-only. It cannot read what is in it, not even what it exported itself. Whoever steals them can add commits, and can tell whether a block that he knows is in the archive.
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run(&["export", archive, pool, "--index", index, "--write-only", &path("laptop")]), @r#"
        Commit 2 ([name]) of `[folder]/a.vmfold`: 1 image, [size] of data in [size]
        Read [size], 0 B known from before; 0 B new, stored in [size]; the archive has [size]
        Parity: [size] of what was written
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run(&["list", archive, "--identity", &path("laptop")]), @r#"
        --- stderr
        error: `[folder]/laptop` holds no identity: one begins with AGE-SECRET-KEY-1
        --- exit 2
    "#);
    let newest = std::fs::read(archive).unwrap();
    std::fs::write(archive, older).unwrap();
    insta::assert_snapshot!(run(&["export", archive, pool, "--index", index, &with("two")]), @r#"
        --- stderr
        error: `[folder]/a.vmfold`: it ends with commit 1, and this host has seen commit 2 (if you put it there yourself, say so with --accept-rollback)
        --- exit 1
    "#);
    std::fs::write(archive, newest).unwrap();
    insta::assert_snapshot!(run(&["list", archive, &with("one")]), @r#"
        --- stderr
        error: the key is wrong: `[folder]/a.vmfold` opens by a passphrase, and by none of what was given (check what was given; vmfold key list tells who holds a key)
        --- exit 1
    "#);
    insta::assert_snapshot!(run(&["key", "rotate", archive, &with("two")]), @r#"
        What is exported from now on is protected by new keys. What was exported before stays as it is: whoever had a key until now can still read that in any copy of the archive, and can still tell whether a block that he knows is in it.
        There is one key now. If it is lost, everything in the archive is lost.
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run(&["export", archive, pool, "--index", index, &with("two")]), @r#"
        Commit 3 ([name]) of `[folder]/a.vmfold`: 1 image, [size] of data in [size]
        Read [size], 0 B known from before; 0 B new, stored in [size]; the archive has [size]
        Parity: [size] of what was written
        --- stderr
        --- exit 0
    "#);
    let mut bytes = std::fs::read(archive).unwrap();
    bytes[500_000..520_000].fill(0);
    std::fs::write(archive, &bytes).unwrap();
    insta::assert_snapshot!(run(&["verify", archive]), @r#"
        3 commits in [size], encrypted: damaged. What is in them was not verified, because no key was given
        Damaged: bytes [range]: a record does not match its hash
        Parity of 10 % for [size], none for [size]: [size] are lost, and would heal by vmfold repair; [size] more would still heal, at any place
        --- stderr
        --- exit 4
    "#);
    let healed = &path("healed.vmfold");
    insta::assert_snapshot!(run(&["repair", archive, "--to", healed]), @r#"
        `[folder]/healed.vmfold`, [size]: all intact
        Parity of 10 % for [size]: [size] lost, [size] computed, 0 B moved
        --- stderr
        --- exit 0
    "#);
    let to = &path("to");
    insta::assert_snapshot!(run(&["import", healed, "--to", to, "--index", index, &with("two")]), @r#"
        Restored 1 image to `[folder]/to`: [size] written, 0 B shared with what was there
        Commit 3 ([name]) of `[folder]/healed.vmfold`: 1 image, [size] of data in [size]
        [size] distinct: [size] new, 0 B on this disk already; takes up to [size], [size] free
        --- stderr
        note: The filesystem cannot share extents: images are restored as plain sparse files, each with its own blocks
        --- exit 0
    "#);
    let content = |folder: &str| std::fs::read(Path::new(folder).join("a.img")).unwrap();
    assert!(content(to) == content(pool));
    insta::assert_snapshot!(run(&["key", "list", &path("one")]), @r#"
        --- stderr
        error: `[folder]/one` is not an archive of vmfold (name a file that vmfold export wrote; with --raw, import takes a raw image)
        --- exit 2
    "#);
}
