//! Makes the calls of a window side by side. A call locks both of its inodes, so two calls that have a file in common would wait for each
//! other in the kernel; others need not.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::{ReclaimOutcome, ShareCall, share};
use crate::error::{Error, Result};
use crate::fs::{Filesystem, SourceFile};
use crate::monitor::Monitor;
use crate::numbers::ImageId;
use crate::pool::Skip;

/// What calls are made with.
#[derive(Clone, Copy)]
pub(super) struct Caller<'a> {
    pub(super) fs: &'a dyn Filesystem,
    pub(super) monitor: &'a dyn Monitor,
    /// Threads at most.
    pub(super) threads: usize,
}

impl Caller<'_> {
    /// Makes the calls of a window, those on one image in their order, until one fails or the user asks to stop. What `ran` says then
    /// does not depend on which thread was faster.
    pub(super) fn share_all(self, window: &[ShareCall], ran: &mut ReclaimOutcome) -> Result<()> {
        if self.threads > 1 {
            let schedule = Schedule::new(window, &ran.refused);
            let threads = self.threads.min(schedule.threads());
            if threads > 1 {
                return self.share_scheduled(schedule, threads, ran);
            }
        }
        for call in window {
            if !self.share_one(*call, ran)? {
                break;
            }
        }
        Ok(())
    }

    /// Makes a call unless the user asked to stop; says whether to go on.
    fn share_one(self, call: ShareCall, ran: &mut ReclaimOutcome) -> Result<bool> {
        if self.monitor.interrupted() {
            ran.interrupted = true;
            return Ok(false);
        }
        share(self.fs, call, ran)?;
        self.monitor.advance(call.length);
        Ok(true)
    }

    fn share_scheduled(self, schedule: Schedule<'_>, threads: usize, ran: &mut ReclaimOutcome) -> Result<()> {
        let queue = Queue {
            schedule: Mutex::new(schedule),
            changed: Condvar::new(),
        };
        std::thread::scope(|scope| {
            for _ in 1..threads {
                // Where no thread can be had, those that there are do its work.
                let _ = std::thread::Builder::new().spawn_scoped(scope, || self.work(&queue));
            }
            self.work(&queue);
        });
        let schedule = queue.schedule.into_inner().unwrap_or_else(PoisonError::into_inner);
        merge(schedule.destinations.into_iter().map(|image| image.part), ran)
    }

    /// Makes calls whose files no other thread has, until there are none left.
    fn work(self, queue: &Queue<'_>) {
        let _end = queue.end();
        let mut schedule = queue.lock();
        while !schedule.is_over() {
            let Some(mut turn) = schedule.begin() else {
                // Some thread is making a call with the files that the next ones need, and will tell.
                schedule = queue.changed.wait(schedule).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let call = schedule.window[turn.place];
            drop(schedule);
            let goes_on = self.share_one(call, &mut turn.part.ran);
            turn.part
                .unreadable_at
                .resize(turn.part.ran.unreadable.len(), turn.place);
            let stops = !matches!(goes_on, Ok(true));
            turn.part.failed = goes_on.err().map(|error| (turn.place, error));
            schedule = queue.lock();
            schedule.stops |= stops;
            schedule.end(turn);
            queue.changed.notify_all();
        }
    }
}

/// What threads take their calls from.
struct Queue<'a> {
    schedule: Mutex<Schedule<'a>>,
    changed: Condvar,
}

impl<'a> Queue<'a> {
    fn lock(&self) -> MutexGuard<'_, Schedule<'a>> {
        self.schedule.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// If a thread panics in the middle of a call, the others do not wait for it.
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

/// What came of the calls on one image.
#[derive(Debug, Default)]
struct ImageOutcome {
    ran: ReclaimOutcome,
    /// For each of `ran.unreadable`, the place in the window of the call that needed it.
    unreadable_at: Vec<usize>,
    failed: Option<(usize, Error)>,
}

/// A call that is being made.
struct CallUnderWay {
    /// Its place in the window.
    place: usize,
    /// What came of the calls on its image before it.
    part: ImageOutcome,
}

/// The calls on one image.
#[derive(Default)]
struct ImageCalls {
    /// Places in the window of those that are still to be made, in their order.
    waiting: VecDeque<usize>,
    /// What came of the others; it is with the call while one is being made.
    part: ImageOutcome,
}

/// Which calls of a window can be made now.
struct Schedule<'a> {
    window: &'a [ShareCall],
    /// For each call, its image as a place in `destinations`, and its two files as places in `inodes`.
    places: Vec<(usize, [usize; 2])>,
    destinations: Vec<ImageCalls>,
    inodes: Vec<Inode>,
    /// Whether no more calls are to be made.
    stops: bool,
}

/// A file that some call of a window has on one of its sides.
#[derive(Debug, Clone, Copy, Default)]
struct Inode {
    /// Bytes of all calls that are still to be made with it.
    left_bytes: u64,
    /// Whether one is being made.
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
                // What was learnt of an image holds for its next calls.
                let known = refused.get(&call.image).map(|reason| (call.image, *reason));
                image.part.ran.refused.extend(known);
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

    /// Changes both files of a call, or the one that is both.
    fn each_inode_of(&mut self, place: usize, change: impl Fn(&mut Inode)) {
        let [one, other] = self.places[place].1;
        change(&mut self.inodes[one]);
        if other != one {
            change(&mut self.inodes[other]);
        }
    }

    /// How many threads can have something to do: calls with the file that takes part in most are made one by one, and take some part of
    /// the time whatever is done beside them.
    fn threads(&self) -> usize {
        let all: u64 = self.window.iter().map(|call| call.length).sum();
        let most = self.inodes.iter().map(|file| file.left_bytes).max().unwrap_or(0);
        usize::try_from(all.div_ceil(most.max(1))).unwrap_or(usize::MAX)
    }

    fn is_over(&self) -> bool {
        self.stops || self.destinations.iter().all(|image| image.waiting.is_empty())
    }

    /// Takes a call neither file of which has a call under way. Of several, it is one with the file for which most is left to do, since
    /// that file decides how long the window takes.
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

    fn end(&mut self, turn: CallUnderWay) {
        self.each_inode_of(turn.place, |file| file.is_locked = false);
        self.destinations[self.places[turn.place].0].part = turn.part;
    }
}

/// Adds up what was done image by image, as if all calls had been made in the order of the window. Where several failed, the first of them
/// counts.
fn merge(parts: impl Iterator<Item = ImageOutcome>, ran: &mut ReclaimOutcome) -> Result<()> {
    let (mut unreadable, mut failed) = (Vec::new(), Vec::new());
    for mut part in parts {
        let errors = std::mem::take(&mut part.ran.unreadable);
        unreadable.extend(part.unreadable_at.into_iter().zip(errors));
        failed.extend(part.failed);
        ran.add(part.ran);
    }
    // The sort is stable, and all that one call could not read is in one part.
    unreadable.sort_by_key(|(place, _)| *place);
    ran.unreadable.extend(unreadable.into_iter().map(|(_, error)| error));
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
            part.ran.counts.calls = 2;
            part.ran.counts.refused_bytes = BTreeMap::from([("no".to_owned(), 4096)]);
            part.ran.opened_meanwhile.insert(image);
            part.ran.refused.insert(image, Skip::Refused);
            part.ran.unreadable = places.map(|place| error(&place.to_string())).into();
            part.unreadable_at = places.into();
            part.failed = Some((failed, error(&format!("failed {failed}"))));
            part
        };
        let parts = || [part(ImageId(7), [1, 4], 6), part(ImageId(8), [0, 3], 5)];
        let [mut one, mut other] = parts();
        let all = |parts: Vec<ImageOutcome>| {
            let mut ran = ReclaimOutcome::default();
            ran.counts.calls = 10;
            ran.unreadable.push(error("before"));
            let failed = merge(parts.into_iter(), &mut ran).unwrap_err();
            (format!("{ran:?}"), failed.to_string(), ran)
        };
        let (text, failed, ran) = all(parts().into());
        assert_eq!(ran.counts.calls, 14);
        assert_eq!(ran.counts.refused_bytes["no"], 2 * 4096);
        assert_eq!(ran.opened_meanwhile, BTreeSet::from([7, 8].map(ImageId)));
        assert_eq!(ran.refused.len(), 2);
        let names: Vec<String> = ran.unreadable.iter().map(ToString::to_string).collect();
        let expected = ["before", "0", "1", "3", "4"].map(|name| error(name).to_string());
        assert_eq!(names, expected);
        assert_eq!(failed, error("failed 5").to_string());
        // Whichever ended first.
        std::mem::swap(&mut one, &mut other);
        let (swapped, swapped_failed, _) = all(vec![one, other]);
        assert_eq!((swapped, swapped_failed), (text, failed));
    }
}
