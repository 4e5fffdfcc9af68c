//! Notices when someone else opens an image, and lets the opener continue at once.
//!
//! A lease on a file that nobody else has open proves that the file is idle, but whoever opens it then waits until the lease is given back,
//! or fails if it does not want to wait (`O_NONBLOCK`, as libvirt inspects images). Therefore the lease is turned into one that concerns
//! writers only, and `inotify` reports all other openers: reading blocks that are being shared is harmless, since their bytes stay the
//! same.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use rustix::thread::Pid;
use signal_hook::consts::SIGIO;

use super::lock;
use crate::sys::lease::{self, Lease};
use crate::sys::priority::Urgency;

/// The longest sleep of the thread. The kernel wakes it earlier when there is something to do; this limit is for signals that got lost.
const SLEEP: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 250_000_000,
};

/// Watches images from a thread of its own until it is dropped.
#[derive(Debug)]
pub(super) struct Watch {
    shared: Arc<WatchState>,
    thread: Option<JoinHandle<()>>,
    /// The thread id.
    number: Pid,
    signal: Option<signal_hook::SigId>,
}

#[derive(Debug)]
struct WatchState {
    images: Mutex<Vec<Watched>>,
    opens: Option<OwnedFd>,
    /// The pair that wakes the thread: it reads from the second what is written to the first.
    wake: (UnixStream, UnixStream),
    ends: AtomicBool,
}

#[derive(Debug)]
struct Watched {
    file: Arc<File>,
    lease: Lease,
    /// Its watch descriptor in `opens`; `None` if it is not watched.
    number: Option<i32>,
    revoked: Arc<AtomicBool>,
}

impl Watch {
    /// Starts the thread.
    ///
    /// # Errors
    /// Returns the error of making the socket pair or installing the signal handler.
    pub(super) fn start() -> std::io::Result<Self> {
        lease::prepare();
        let wake = UnixStream::pair()?;
        wake.1.set_nonblocking(true)?;
        let signal = signal_hook::low_level::pipe::register(SIGIO, wake.0.try_clone()?)?;
        let shared = Arc::new(WatchState {
            images: Mutex::default(),
            // Without inotify, the leases keep readers waiting too.
            opens: inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).ok(),
            wake,
            ends: AtomicBool::new(false),
        });
        let (started, number) = std::sync::mpsc::sync_channel(1);
        let thread = std::thread::spawn({
            let shared = shared.clone();
            move || {
                let _ = started.send(rustix::thread::gettid());
                shared.run();
            }
        });
        Ok(Self {
            number: number.recv().map_err(std::io::Error::other)?,
            shared,
            thread: Some(thread),
            signal: Some(signal),
        })
    }

    /// Takes a lease on an image and watches it. The returned flag is set once someone else wants the image.
    ///
    /// # Errors
    /// Returns `EAGAIN` if someone has the image open already.
    pub(super) fn add(&self, file: &Arc<File>, lease: Lease) -> Result<Arc<AtomicBool>, Errno> {
        // While this is locked, the thread cannot miss an opener in between two leases.
        let mut images = lock(&self.shared.images);
        // Otherwise the kernel may signal any thread, and one in the idle classes would keep the opener waiting until it gets the
        // processor.
        let _ = lease::tell(&**file, self.number);
        lease::take(&**file, lease)?;
        let mut watched = Watched {
            file: file.clone(),
            lease,
            number: None,
            revoked: Arc::default(),
        };
        if lease == Lease::All
            && let Some(opens) = &self.shared.opens
            && let Ok(number) =
                inotify::add_watch(opens, format!("/proc/self/fd/{}", file.as_raw_fd()), WatchFlags::OPEN)
            && lease::take(&**file, Lease::Writers).is_ok()
        {
            (watched.number, watched.lease) = (Some(number), Lease::Writers);
        }
        let revoked = watched.revoked.clone();
        images.push(watched);
        Ok(revoked)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Release);
        let _ = std::io::Write::write(&mut &self.shared.wake.0, &[0]);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let Some(signal) = self.signal.take() {
            signal_hook::low_level::unregister(signal);
        }
    }
}

impl WatchState {
    fn run(&self) {
        let urgency = Urgency::of_this_thread();
        while !self.ends.load(Ordering::Acquire) {
            let mut sources = vec![PollFd::new(&self.wake.1, PollFlags::IN)];
            sources.extend(self.opens.as_ref().map(|opens| PollFd::new(opens, PollFlags::IN)));
            // An interrupted poll is a reason to check, like any other.
            let _ = poll(&mut sources, Some(&SLEEP));
            let mut buffer = [0; 64];
            while std::io::Read::read(&mut &self.wake.1, &mut buffer).is_ok_and(|read| read > 0) {}
            let opened = self.opened();
            let mut images = lock(&self.images);
            if revoke(&mut images, &opened) {
                urgency.raise();
            } else {
                urgency.settle();
            }
        }
    }

    /// Returns the watch descriptors of the images that were opened. `None` stands for all of them, after an overflow of the kernel's
    /// queue.
    fn opened(&self) -> Vec<Option<i32>> {
        let Some(opens) = &self.opens else {
            return Vec::new();
        };
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(opens, &mut buffer);
        let mut opened = Vec::new();
        while let Ok(event) = events.next() {
            if event.events().contains(ReadFlags::QUEUE_OVERFLOW) {
                opened.push(None);
            } else if event.events().contains(ReadFlags::OPEN) {
                opened.push(Some(event.wd()));
            }
        }
        opened
    }
}

/// Gives up the images that someone wants, and returns whether there were any.
fn revoke(images: &mut Vec<Watched>, opened: &[Option<i32>]) -> bool {
    let before = images.len();
    images.retain(|image| {
        let is_opened = opened.iter().any(|number| number.is_none() || *number == image.number);
        let is_mine = lease::is_held(&*image.file, image.lease) && !is_opened;
        if !is_mine {
            // The flag comes first, so that no call begins once the opener continues.
            image.revoked.store(true, Ordering::Release);
            let _ = lease::release(&*image.file);
        }
        is_mine
    });
    images.len() < before
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use rustix::fs::{Mode, OFlags};

    use super::*;

    fn image() -> (tempfile::NamedTempFile, Arc<File>) {
        let named = tempfile::NamedTempFile::new().unwrap();
        let path = named.into_temp_path();
        let file = File::open(&path).unwrap();
        (
            tempfile::NamedTempFile::from_parts(file.try_clone().unwrap(), path),
            Arc::new(file),
        )
    }

    fn becomes_set(revoked: &AtomicBool) -> bool {
        let since = Instant::now();
        while !revoked.load(Ordering::Acquire) && since.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(1));
        }
        revoked.load(Ordering::Acquire)
    }

    #[test]
    fn who_only_looks_is_let_through_and_noticed() {
        let watch = Watch::start().unwrap();
        let ((named, file), (_other_named, other)) = (image(), image());
        let revoked = watch.add(&file, Lease::All).unwrap();
        let untouched = watch.add(&other, Lease::All).unwrap();
        // libvirt inspects images with these flags: it would rather fail than wait.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let looked = rustix::fs::open(named.path(), flags, Mode::empty());
        assert!(looked.is_ok(), "{looked:?}");
        assert!(becomes_set(&revoked));
        assert!(!untouched.load(Ordering::Acquire));
    }

    #[test]
    fn who_writes_waits_for_a_moment_only() {
        let watch = Watch::start().unwrap();
        for lease in [Lease::All, Lease::Writers] {
            let (named, file) = image();
            let revoked = watch.add(&file, lease).unwrap();
            // After 45 seconds, the kernel would break the lease and let the opener continue by itself.
            let since = Instant::now();
            let opened = File::options().write(true).open(named.path());
            assert!(opened.is_ok(), "{opened:?}");
            assert!(since.elapsed() < Duration::from_secs(20));
            assert!(
                revoked.load(Ordering::Acquire),
                "no call may begin once the opener goes on"
            );
        }
    }

    #[test]
    fn what_is_open_elsewhere_is_not_taken() {
        let watch = Watch::start().unwrap();
        let (named, file) = image();
        let reader = File::open(named.path()).unwrap();
        assert_eq!(watch.add(&file, Lease::All).unwrap_err(), Errno::AGAIN);
        drop(reader);
        assert!(watch.add(&file, Lease::All).is_ok());
        let (named, file) = image();
        let _writer = File::options().write(true).open(named.path()).unwrap();
        assert_eq!(watch.add(&file, Lease::Writers).unwrap_err(), Errno::AGAIN);
    }
}
