//! Stands in for `qubesd`: its two sockets, machines, and volumes of a file-reflink pool. It can fail at any call.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::common::reflink;

/// What it does instead of answering.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// It answers with an exception.
    Refuse,
    /// It closes the connection, before or after it has done what it was asked for.
    Close { is_done: bool },
    /// It answers this.
    Say(Vec<u8>),
    /// It does not answer, until it is dropped.
    Hang,
    /// It answers without an end.
    Flood,
    /// It does what it is asked for, after a machine was started, wrote to this image, and was shut down.
    Started(PathBuf),
}

pub(crate) struct Machine {
    pub(crate) class: &'static str,
    pub(crate) state: &'static str,
    pub(crate) tags: BTreeSet<String>,
    /// Volumes that are kept, each with the revisions that it keeps.
    pub(crate) volumes: BTreeMap<&'static str, u32>,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) machines: BTreeMap<String, Machine>,
    /// Calls, each as `METHOD machine argument payload`.
    pub(crate) calls: Vec<String>,
    /// At which call it fails, after so many of these, and how.
    pub(crate) fault: Option<(&'static str, usize, Fault)>,
    /// Volumes of this pool tell no folder.
    pub(crate) is_lvm: bool,
}

pub(crate) struct StandIn {
    pub(crate) pool: PathBuf,
    pub(crate) sockets: tempfile::TempDir,
    pub(crate) state: Arc<Mutex<State>>,
    is_over: Arc<AtomicBool>,
}

struct Server {
    pool: PathBuf,
    state: Arc<Mutex<State>>,
    is_over: Arc<AtomicBool>,
}

impl StandIn {
    pub(crate) fn new(pool: &Path) -> Self {
        for folder in ["appvms", "vm-templates"] {
            std::fs::create_dir_all(pool.join(folder)).unwrap();
        }
        let stand_in = Self {
            pool: pool.to_owned(),
            sockets: tempfile::tempdir().unwrap(),
            state: Arc::default(),
            is_over: Arc::default(),
        };
        for name in ["qubesd.sock", "qubesd.internal.sock"] {
            let listener = UnixListener::bind(stand_in.sockets.path().join(name)).unwrap();
            let server = Arc::new(Server {
                pool: pool.to_owned(),
                state: Arc::clone(&stand_in.state),
                is_over: Arc::clone(&stand_in.is_over),
            });
            let is_internal = name.contains("internal");
            std::thread::spawn(move || {
                for stream in listener.incoming().map_while(Result::ok) {
                    if server.is_over.load(Ordering::Relaxed) {
                        return;
                    }
                    let server = Arc::clone(&server);
                    std::thread::spawn(move || server.serve(stream, is_internal));
                }
            });
        }
        stand_in
    }

    /// Makes a machine with blank volumes.
    pub(crate) fn add(&self, name: &str, class: &'static str, volumes: &[&'static str]) {
        let machine = Machine {
            class,
            state: "Halted",
            tags: BTreeSet::new(),
            volumes: volumes.iter().map(|volume| (*volume, 1)).collect(),
        };
        for volume in volumes {
            let path = self.image(name, class, volume);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            new_file(&path, 2 << 20);
        }
        self.state.lock().unwrap().machines.insert(name.into(), machine);
    }

    pub(crate) fn image(&self, name: &str, class: &str, volume: &str) -> PathBuf {
        self.pool.join(vid_of(name, class, volume) + ".img")
    }

    pub(crate) fn fail(&self, call: &'static str, after: usize, fault: Fault) {
        self.state.lock().unwrap().fault = Some((call, after, fault));
    }

    pub(crate) fn heal(&self) {
        self.state.lock().unwrap().fault = None;
    }

    /// The calls since the last time, without what only asks.
    pub(crate) fn orders(&self) -> Vec<String> {
        let calls = std::mem::take(&mut self.state.lock().unwrap().calls);
        let asks = [
            "admin.vm.List",
            "admin.vm.CurrentState",
            "admin.vm.volume.Info",
            "admin.vm.tag.Get",
        ];
        calls
            .into_iter()
            .filter(|call| !asks.iter().any(|ask| call.starts_with(ask)))
            .collect()
    }

    pub(crate) fn tags(&self) -> usize {
        let state = self.state.lock().unwrap();
        state.machines.values().map(|machine| machine.tags.len()).sum()
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        for name in ["qubesd.sock", "qubesd.internal.sock"] {
            let _ = UnixStream::connect(self.sockets.path().join(name));
        }
    }
}

fn vid_of(name: &str, class: &str, volume: &str) -> String {
    let parent = if class == "TemplateVM" {
        "vm-templates"
    } else {
        "appvms"
    };
    format!("{parent}/{name}/{volume}")
}

/// Makes a sparse file, in the place of one that may be there.
fn new_file(path: &Path, bytes: u64) {
    let temporary = path.with_extension("img~new");
    let file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .unwrap();
    file.set_len(bytes).unwrap();
    std::fs::rename(temporary, path).unwrap();
}

fn exception(kind: &str, text: &str) -> Vec<u8> {
    format!("2\0{kind}\0\0{text}\0").into_bytes()
}

fn success(text: &str) -> Vec<u8> {
    format!("0\0{text}").into_bytes()
}

impl Server {
    fn serve(&self, mut stream: UnixStream, is_internal: bool) {
        let mut request = Vec::new();
        if stream.read_to_end(&mut request).is_err() || request.is_empty() {
            return;
        }
        let request = String::from_utf8(request).unwrap();
        let (header, payload) = request.split_once('\0').unwrap();
        let words: Vec<&str> = header.splitn(4, ' ').collect();
        let [call, "dom0", "name", machine] = words[..] else {
            panic!("{header}")
        };
        let (method, argument) = call.split_once('+').unwrap();
        assert_eq!(method.starts_with("internal."), is_internal, "{method}");
        let fault = {
            let mut state = self.state.lock().unwrap();
            state
                .calls
                .push(format!("{method} {machine} {argument} {payload}").trim_end().to_owned());
            match &mut state.fault {
                Some((call, 0, fault)) if method.ends_with(*call) => Some(fault.clone()),
                Some((call, after, _)) if method.ends_with(*call) => {
                    *after -= 1;
                    None
                }
                _ => None,
            }
        };
        match fault {
            None => {
                let answer = self.answer(method, machine, argument, payload);
                let _ = stream.write_all(&answer);
            }
            Some(Fault::Refuse) => {
                let _ = stream.write_all(&exception("QubesException", "it was told to refuse"));
            }
            Some(Fault::Close { is_done }) => {
                if is_done {
                    self.answer(method, machine, argument, payload);
                }
            }
            Some(Fault::Say(answer)) => {
                let _ = stream.write_all(&answer);
            }
            Some(Fault::Hang) => {
                while !self.is_over.load(Ordering::Relaxed) {
                    std::thread::sleep(std::time::Duration::from_millis(20));
                }
            }
            Some(Fault::Flood) => {
                let much = vec![b'0'; 1 << 16];
                while stream.write_all(&much).is_ok() {}
            }
            Some(Fault::Started(image)) => {
                std::fs::write(&image, b"what the user has").unwrap();
                File::open(image).unwrap().sync_all().unwrap();
                let answer = self.answer(method, machine, argument, payload);
                let _ = stream.write_all(&answer);
            }
        }
    }

    fn answer(&self, method: &str, name: &str, argument: &str, payload: &str) -> Vec<u8> {
        let mut state = self.state.lock().unwrap();
        if method == "admin.vm.List" {
            let machines = state.machines.iter();
            let lines = machines.map(|(name, one)| format!("{name} class={} state={} uuid=0\n", one.class, one.state));
            return success(&(String::from("dom0 class=AdminVM state=Running uuid=0\n") + &lines.collect::<String>()));
        }
        let is_lvm = state.is_lvm;
        let Some(machine) = state.machines.get_mut(name) else {
            return exception("QubesVMNotFoundError", name);
        };
        match method {
            "admin.vm.CurrentState" => success(&format!(
                "mem=0 mem_static_max=0 cputime=0 power_state={}",
                machine.state
            )),
            "admin.vm.tag.Get" => success(if machine.tags.contains(argument) { "1" } else { "0" }),
            "admin.vm.tag.Set" => {
                machine.tags.insert(argument.into());
                success("")
            }
            "admin.vm.tag.Remove" if machine.tags.remove(argument) => success(""),
            "admin.vm.tag.Remove" => exception("QubesTagNotFoundError", argument),
            _ => match machine.volumes.get(argument) {
                Some(keep) => self.volume(
                    method,
                    &vid_of(name, machine.class, argument),
                    *keep,
                    payload,
                    machine,
                    is_lvm,
                ),
                None if method == "admin.vm.volume.Info" => success(&format!(
                    "pool=p\nvid=v\nsize=0\nusage=0\nsave_on_stop=False\nrevisions_to_keep=0\npath=/x\n{argument}=\n"
                )),
                None => exception("ProtocolError", "no such volume"),
            },
        }
    }

    fn volume(&self, method: &str, vid: &str, keep: u32, payload: &str, machine: &Machine, is_lvm: bool) -> Vec<u8> {
        let at = |end: &str| self.pool.join(format!("{vid}{end}"));
        let (clean, import) = (at(".img"), at("-import.img"));
        match method {
            "admin.vm.volume.Info" => {
                let found = clean.metadata().unwrap();
                let path = if is_lvm {
                    PathBuf::from("/dev/qubes_dom0/vm-x")
                } else {
                    at("-dirty.img")
                };
                success(&format!(
                    "pool=varlibqubes\nvid={vid}\nsize={}\nusage={}\nrw=True\nsource=\npath={}\nsave_on_stop=True\nsnap_on_start=False\n\
                     revisions_to_keep={keep}\nephemeral=False\nis_outdated=False\n",
                    found.len(),
                    found.blocks() * 512,
                    path.display()
                ))
            }
            "internal.vm.volume.ImportBegin" => {
                if machine.state != "Halted" {
                    return exception("QubesVMNotHaltedError", "Domain is not powered off");
                }
                assert!(
                    machine.tags.contains("backup-restore-in-progress"),
                    "it could be started"
                );
                let size: u64 = payload.parse().unwrap();
                new_file(&import, size);
                success(&format!("{size} {}", import.display()))
            }
            "internal.vm.volume.ImportEnd" if payload == "ok" => {
                if keep > 0 {
                    let revisions = std::fs::read_dir(clean.parent().unwrap()).unwrap();
                    let name = clean.file_name().unwrap().to_str().unwrap().to_owned() + ".";
                    let count = revisions.filter(|one| {
                        let found = one.as_ref().unwrap().file_name();
                        found.to_str().unwrap().starts_with(&name)
                    });
                    let number = count.count() + 1;
                    reflink(&clean, &at(&format!(".img.{number}@2026-01-01T00:00:00Z")));
                }
                std::fs::rename(&import, &clean).unwrap();
                let _ = std::fs::remove_file(at("-precache.img"));
                reflink(&clean, &at("-precache.img"));
                success("")
            }
            "internal.vm.volume.ImportEnd" => {
                let _ = std::fs::remove_file(import);
                exception("QubesException", &format!("Data import failed: {payload}"))
            }
            _ => exception("ProtocolError", "no such method"),
        }
    }
}
