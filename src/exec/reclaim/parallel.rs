//! Makes the calls of a window on several threads. The kernel locks both inodes of a call, so two calls that have a file in common would
//! wait for each other. Only calls without a common file are made at the same time.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::{ReclaimOutcome, ShareCall, share};
use crate::error::{Error, Result};
use crate::fs::{Filesystem, SourceFile};
use crate::monitor::Monitor;
use crate::numbers::ImageId;
use crate::pool::Skip;

/// Makes calls, on one thread or on several.
#[derive(Clone, Copy)]
pub(super) struct Caller<'a> {
    pub(super) fs: &'a dyn Filesystem,
    pub(super) monitor: &'a dyn Monitor,
    /// The largest number of threads.
    pub(super) threads: usize,
}

impl Caller<'_> {
    /// Makes the calls of a window until one fails or the user asks to stop. The calls on one image are made in their order. If all are made,
    /// the outcome does not depend on which thread was faster.
    pub(super) fn share_all(self, window: &[ShareCall], outcome: &mut ReclaimOutcome) -> Result<()> {
        if self.threads > 1 {
            let schedule = Schedule::new(window, &outcome.refused);
            let threads = self.threads.min(schedule.threads());
            if threads > 1 {
                return self.share_scheduled(schedule, threads, outcome);
            }
        }
        for call in window {
            if !self.share_one(*call, outcome)? {
                break;
            }
        }
        Ok(())
    }

    /// Makes a call unless the user has asked to stop. Returns whether to go on.
    fn share_one(self, call: ShareCall, outcome: &mut ReclaimOutcome) -> Result<bool> {
        if self.monitor.interrupted() {
            outcome.interrupted = true;
            return Ok(false);
        }
        share(self.fs, call, outcome)?;
        self.monitor.advance(call.length);
        Ok(true)
    }

    /// Makes all calls of a schedule on several threads.
    fn share_scheduled(self, schedule: Schedule<'_>, threads: usize, outcome: &mut ReclaimOutcome) -> Result<()> {
        let queue = Queue {
            schedule: Mutex::new(schedule),
            changed: Condvar::new(),
        };
        std::thread::scope(|scope| {
            for _ in 1..threads {
                // If a thread cannot be started, the others do its work.
                let _ = std::thread::Builder::new().spawn_scoped(scope, || self.work(&queue));
            }
            self.work(&queue);
        });
        let schedule = queue.schedule.into_inner().unwrap_or_else(PoisonError::into_inner);
        merge(schedule.destinations.into_iter().map(|image| image.part), outcome)
    }

    /// Makes calls whose files no other thread uses, until none is left.
    fn work(self, queue: &Queue<'_>) {
        let _end = queue.end();
        let mut schedule = queue.lock();
        while !schedule.is_over() {
            let Some(mut under_way) = schedule.begin() else {
                // Other threads use the files of all calls that are left. They notify this one when they are done.
                schedule = queue.changed.wait(schedule).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let call = schedule.window[under_way.place];
            drop(schedule);
            let goes_on = self.share_one(call, &mut under_way.part.outcome);
            let part = &mut under_way.part;
            part.unreadable_at
                .resize(part.outcome.unreadable.len(), under_way.place);
            let stops = !matches!(goes_on, Ok(true));
            part.failed = goes_on.err().map(|error| (under_way.place, error));
            schedule = queue.lock();
            schedule.stops |= stops;
            schedule.end(under_way);
            queue.changed.notify_all();
        }
    }
}

/// The schedule that threads take their calls from.
struct Queue<'a> {
    schedule: Mutex<Schedule<'a>>,
    changed: Condvar,
}

impl<'a> Queue<'a> {
    fn lock(&self) -> MutexGuard<'_, Schedule<'a>> {
        self.schedule.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a guard. If the thread panics in the middle of a call, the guard has the others end instead of waiting for it.
    fn end(&self) -> impl Drop + '_ {
        struct End<'a, 'b>(&'a Queue<'b>);
        impl Drop for End<'_, '_> {
            fn drop(&mut self) {
                if std::thread::panicking() {
                    self.0.lock().stops = true;
                    self.0.changed.notify_all();
                }
            }
        }
        End(self)
    }
}

/// The outcome of the calls on one image.
#[derive(Debug, Default)]
struct ImageOutcome {
    outcome: ReclaimOutcome,
    /// For each of `outcome.unreadable`, the place in the window of the call that needed it.
    unreadable_at: Vec<usize>,
    /// The error that ended the calls, with the place in the window of the call that failed.
    failed: Option<(usize, Error)>,
}

/// A call that is being made.
struct CallUnderWay {
    /// Its place in the window.
    place: usize,
    /// The outcome of the calls on its image so far.
    part: ImageOutcome,
}

/// The calls on one image.
#[derive(Default)]
struct ImageCalls {
    /// The places in the window of the calls that are still to be made, in their order.
    waiting: VecDeque<usize>,
    /// The outcome of the calls that were made. While a call is being made, it is in its [`CallUnderWay`].
    part: ImageOutcome,
}

/// The calls of a window, and which of them can be made at the moment.
struct Schedule<'a> {
    window: &'a [ShareCall],
    /// For each call the place of its image in `destinations`, and the places of its two files in `inodes`.
    places: Vec<(usize, [usize; 2])>,
    destinations: Vec<ImageCalls>,
    inodes: Vec<Inode>,
    /// Whether no more calls are to be made.
    stops: bool,
}

/// A file that calls of a window have as source or as destination.
#[derive(Debug, Clone, Copy, Default)]
struct Inode {
    /// Bytes of all calls that are still to be made with it.
    left_bytes: u64,
    /// Whether a call with it is being made.
    is_locked: bool,
}

impl<'a> Schedule<'a> {
    fn new(window: &'a [ShareCall], refused: &BTreeMap<ImageId, Skip>) -> Self {
        let mut schedule = Self {
            window,
            places: Vec::with_capacity(window.len()),
            destinations: Vec::new(),
            inodes: Vec::new(),
            stops: false,
        };
        let (mut images, mut files) = (HashMap::new(), HashMap::new());
        for (place, call) in window.iter().enumerate() {
            let image = *images.entry(call.image).or_insert_with(|| {
                let mut image = ImageCalls::default();
                // An image that the filesystem refused in an earlier window is refused in this one.
                let known = refused.get(&call.image).map(|reason| (call.image, *reason));
                image.part.outcome.refused.extend(known);
                schedule.destinations.push(image);
                schedule.destinations.len() - 1
            });
            schedule.destinations[image].waiting.push_back(place);
            let sides = [SourceFile::Image(call.image), call.source].map(|file| {
                *files.entry(file).or_insert_with(|| {
                    schedule.inodes.push(Inode::default());
                    schedule.inodes.len() - 1
                })
            });
            schedule.places.push((image, sides));
            schedule.each_inode_of(place, |file| file.left_bytes += call.length);
        }
        schedule
    }

    /// Applies a change to both files of a call, or once if they are the same.
    fn each_inode_of(&mut self, place: usize, change: impl Fn(&mut Inode)) {
        let [destination, source] = self.places[place].1;
        change(&mut self.inodes[destination]);
        if source != destination {
            change(&mut self.inodes[source]);
        }
    }

    /// The number of threads that can have something to do. The calls with the busiest file are made one after the other, so they take their
    /// part of the time however many threads there are.
    fn threads(&self) -> usize {
        let total_bytes: u64 = self.window.iter().map(|call| call.length).sum();
        let busiest_bytes = self.inodes.iter().map(|file| file.left_bytes).max().unwrap_or(0);
        usize::try_from(total_bytes.div_ceil(busiest_bytes.max(1))).unwrap_or(usize::MAX)
    }

    /// Whether no call is left, or no more are to be made.
    fn is_over(&self) -> bool {
        self.stops || self.destinations.iter().all(|image| image.waiting.is_empty())
    }

    /// Takes a call whose files are both free. Of several, it takes one with the file that has the most bytes left, because that file decides
    /// how long the window takes.
    fn begin(&mut self) -> Option<CallUnderWay> {
        let next = self
            .destinations
            .iter()
            .filter_map(|image| image.waiting.front().copied());
        let next = next.filter_map(|place| {
            let files = self.places[place].1.map(|file| self.inodes[file]);
            let is_free = files.iter().all(|file| !file.is_locked);
            is_free.then_some((files[0].left_bytes.max(files[1].left_bytes), std::cmp::Reverse(place)))
        });
        let (_, std::cmp::Reverse(place)) = next.max()?;
        let length = self.window[place].length;
        self.each_inode_of(place, |file| {
            file.left_bytes -= length;
            file.is_locked = true;
        });
        let image = &mut self.destinations[self.places[place].0];
        image.waiting.pop_front();
        Some(CallUnderWay {
            place,
            part: std::mem::take(&mut image.part),
        })
    }

    /// Frees the files of a call that was made, and keeps its outcome.
    fn end(&mut self, made: CallUnderWay) {
        self.each_inode_of(made.place, |file| file.is_locked = false);
        self.destinations[self.places[made.place].0].part = made.part;
    }
}

/// Adds up the outcomes of images, as if all calls had been made in the order of the window. If several calls failed, the error of the first
/// one in the window is returned.
fn merge(parts: impl Iterator<Item = ImageOutcome>, outcome: &mut ReclaimOutcome) -> Result<()> {
    let (mut unreadable, mut failed) = (Vec::new(), Vec::new());
    for mut part in parts {
        let errors = std::mem::take(&mut part.outcome.unreadable);
        unreadable.extend(part.unreadable_at.into_iter().zip(errors));
        failed.extend(part.failed);
        outcome.add(part.outcome);
    }
    // The sort is stable, and all errors of one call are in one part.
    unreadable.sort_by_key(|(place, _)| *place);
    outcome
        .unreadable
        .extend(unreadable.into_iter().map(|(_, error)| error));
    let first = failed.into_iter().min_by_key(|(place, _)| *place);
    first.map_or(Ok(()), |(_, error)| Err(error))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use rustix::io::Errno;

    use super::*;

    fn calls(calls: &[(ImageId, ImageId, u64)]) -> Vec<ShareCall> {
        let call = |(source, image, length): &(ImageId, ImageId, u64)| ShareCall {
            source: SourceFile::Image(*source),
            source_offset: 0,
            image: *image,
            offset: 0,
            length: *length,
        };
        calls.iter().map(call).collect()
    }

    #[test]
    fn no_more_threads_than_have_something_to_do() {
        let threads = |all: &[(ImageId, ImageId, u64)]| Schedule::new(&calls(all), &BTreeMap::new()).threads();
        assert_eq!(
            threads(&[
                (ImageId(0), ImageId(1), 1),
                (ImageId(0), ImageId(2), 1),
                (ImageId(0), ImageId(3), 1)
            ]),
            1,
            "they have a source in common"
        );
        assert_eq!(
            threads(&[
                (ImageId(1), ImageId(0), 1),
                (ImageId(2), ImageId(0), 1),
                (ImageId(0), ImageId(3), 1)
            ]),
            1,
            "they have an image in common"
        );
        assert_eq!(
            threads(&[(ImageId(0), ImageId(0), 3), (ImageId(0), ImageId(1), 1)]),
            1,
            "an image may be its own source"
        );
        assert_eq!(
            threads(&[
                (ImageId(0), ImageId(1), 1),
                (ImageId(2), ImageId(3), 1),
                (ImageId(4), ImageId(5), 1)
            ]),
            3
        );
        assert_eq!(
            threads(&[
                (ImageId(0), ImageId(1), 4),
                (ImageId(0), ImageId(2), 4),
                (ImageId(3), ImageId(2), 1)
            ]),
            2
        );
        assert_eq!(threads(&[]), 0);
    }

    #[test]
    fn the_file_with_most_to_do_never_waits() {
        let window = calls(&[
            (ImageId(5), ImageId(6), 1),
            (ImageId(5), ImageId(6), 1),
            (ImageId(0), ImageId(1), 1),
            (ImageId(0), ImageId(2), 1),
            (ImageId(0), ImageId(3), 1),
            (ImageId(0), ImageId(1), 1),
        ]);
        let mut schedule = Schedule::new(&window, &BTreeMap::new());
        let first = schedule.begin().unwrap();
        let beside = schedule.begin().unwrap();
        assert_eq!((first.place, beside.place), (2, 0));
        assert!(schedule.begin().is_none(), "all others need one of their files");
        schedule.end(first);
        assert_eq!(schedule.begin().unwrap().place, 3);
    }

    proptest! {
        #[test]
        fn calls_under_way_have_no_file_in_common_and_each_image_has_its_order(
            all in prop::collection::vec(((0u32..8).prop_map(ImageId), (0u32..8).prop_map(ImageId), 1u64..100), 0..60),
            ends in prop::collection::vec(any::<prop::sample::Index>(), 60),
            threads in 1usize..6,
        ) {
            let window = calls(&all);
            let mut schedule = Schedule::new(&window, &BTreeMap::new());
            let (mut under_way, mut begun, mut ends) = (Vec::new(), Vec::new(), ends.into_iter());
            while !schedule.is_over() || !under_way.is_empty() {
                while under_way.len() < threads && let Some(turn) = schedule.begin() {
                    begun.push(turn.place);
                    under_way.push(turn);
                }
                let files = under_way.iter().map(|turn: &CallUnderWay| {
                    let call = window[turn.place];
                    BTreeSet::from([SourceFile::Image(call.image), call.source].map(|file| format!("{file:?}")))
                });
                let files: Vec<BTreeSet<String>> = files.collect();
                let distinct: BTreeSet<&String> = files.iter().flatten().collect();
                prop_assert_eq!(distinct.len(), files.iter().map(BTreeSet::len).sum::<usize>());
                prop_assert!(!under_way.is_empty(), "nobody would ever go on");
                let ended = ends.next().unwrap().index(under_way.len());
                schedule.end(under_way.swap_remove(ended));
            }
            prop_assert!(schedule.inodes.iter().all(|inode| inode.left_bytes == 0 && !inode.is_locked));
            for image in 0..8 {
                let mut places = begun.iter().filter(|place| window[**place].image == ImageId(image));
                prop_assert!(places.by_ref().is_sorted());
            }
            begun.sort_unstable();
            prop_assert_eq!(begun, (0..window.len()).collect::<Vec<_>>());
        }
    }

    fn error(name: &str) -> Error {
        Error::io("read", std::path::Path::new(name))(Errno::IO)
    }

    #[test]
    fn images_add_up_in_the_order_of_the_window() {
        let part = |image, places: [usize; 2], failed: usize| {
            let mut part = ImageOutcome::default();
            part.outcome.counts.calls = 2;
            part.outcome.counts.refused_bytes = BTreeMap::from([("no".to_owned(), 4096)]);
            part.outcome.opened_meanwhile.insert(image);
            part.outcome.refused.insert(image, Skip::Refused);
            part.outcome.unreadable = places.map(|place| error(&place.to_string())).into();
            part.unreadable_at = places.into();
            part.failed = Some((failed, error(&format!("failed {failed}"))));
            part
        };
        let parts = || [part(ImageId(7), [1, 4], 6), part(ImageId(8), [0, 3], 5)];
        let merged = |parts: Vec<ImageOutcome>| {
            let mut outcome = ReclaimOutcome::default();
            outcome.counts.calls = 10;
            outcome.unreadable.push(error("before"));
            let failed = merge(parts.into_iter(), &mut outcome).unwrap_err();
            (format!("{outcome:?}"), failed.to_string(), outcome)
        };
        let (text, failed, outcome) = merged(parts().into());
        assert_eq!(outcome.counts.calls, 14);
        assert_eq!(outcome.counts.refused_bytes["no"], 2 * 4096);
        assert_eq!(outcome.opened_meanwhile, BTreeSet::from([7, 8].map(ImageId)));
        assert_eq!(outcome.refused.len(), 2);
        let names: Vec<String> = outcome.unreadable.iter().map(ToString::to_string).collect();
        let expected = ["before", "0", "1", "3", "4"].map(|name| error(name).to_string());
        assert_eq!(names, expected);
        assert_eq!(failed, error("failed 5").to_string());
        let mut reversed: Vec<ImageOutcome> = parts().into();
        reversed.reverse();
        let (swapped, swapped_failed, _) = merged(reversed);
        assert_eq!((swapped, swapped_failed), (text, failed));
    }
}
