//! The skeleton of a backup in version 3: the same backup without its images. Parts are copied as they are, once they are authenticated. What a
//! template has comes as one member, with its images, and is left out.

use std::collections::BTreeSet;

use super::Qvm3;
use crate::error::Result;
use crate::foreign::Skeleton;
use crate::foreign::qvm::skeleton::{IS_SKELETON, empty_of, is_image, is_skeleton, to_be_marked};

/// The member that is the whole folder of a machine.
const WHOLE_FOLDER: &str = ".";

impl Qvm3<'_> {
    /// Reads on to the end, and makes a skeleton. What is copied of it is not decrypted.
    pub(in crate::foreign::qvm) fn into_skeleton(mut self) -> Result<Skeleton> {
        self.monitor.phase("Reading the backup", 0);
        let (mut have, mut lacks_home) = (BTreeSet::new(), false);
        loop {
            let next = self.parts.borrow_mut().peek()?.map(|part| part.member.clone());
            let Some(member) = next else { break };
            if !self.seen.insert(member.clone()) {
                return Err(self.damaged(None, "it has a member twice"));
            }
            let (folder, file) = member.rsplit_once('/').unwrap_or((&member, ""));
            let is_home = folder == "dom0-home";
            if !is_home && !self.machines.iter().any(|machine| machine.folder == folder) {
                return Err(self.damaged(None, "it has a member of a machine that its qubes.xml does not have"));
            }
            lacks_home |= is_home;
            let is_copied = !is_home && !is_image(file) && file != WHOLE_FOLDER;
            if is_copied {
                have.insert(folder.to_owned());
            }
            // What is read is copied.
            self.checks_all = is_copied;
            self.pass_over(&member)?;
        }
        self.check_members()?;
        for folder in to_be_marked(&self.machines, &have, |member| self.seen.contains(member)) {
            // Nothing is extracted of it, so that it may be empty itself.
            let name = format!("{}.000", empty_of(&folder));
            self.parts.borrow_mut().add_to_copy(&name, &[])?;
        }
        let bytes = self.parts.borrow_mut().take_copy();
        Ok(Skeleton {
            bytes,
            machines: self.machines,
            lacks_home,
        })
    }

    /// Checks that each image is there that the machines must have, as far as the names of members tell.
    fn check_members(&self) -> Result<()> {
        let has = |folder: &str, file: &str| self.seen.contains(&format!("{folder}/{file}"));
        let has_image = |folder: &str, image: &str| has(folder, image) || has(folder, WHOLE_FOLDER);
        if is_skeleton(
            &self.machines,
            |machine, image| has_image(&machine.folder, image),
            |member| self.seen.contains(member),
        ) {
            return Err(self.refused(IS_SKELETON));
        }
        for machine in &self.machines {
            if let Some(image) = machine.images.iter().find(|image| !has_image(&machine.folder, image)) {
                let path = machine.path.join(image);
                return Err(self.damaged(Some(&path), "it is not there, and its machine was backed up"));
            }
        }
        Ok(())
    }
}
