"""Restores a backup by the code of qubes-core-admin-client, into machines that only note what is done to them.

    restore-upstream.py CHECKOUT BACKUP

The passphrase is `secret`. It prints the machines that were made, whether something was imported into each of their volumes, and how many errors
there were.
"""

import sys
import tempfile
from unittest import mock

sys.path.insert(0, sys.argv[1])
import qubesadmin.backup.restore as restore

app = mock.MagicMock()
app.domains = {}
made = []


def volume(name):
    one = mock.MagicMock()
    one.name = name
    one.save_on_stop = True
    return one


def add_new_vm(klass, name, label, pool=None, **_):
    machine = mock.MagicMock()
    machine.name, machine.klass = name, klass
    names = ["root", "private"] if klass == "TemplateVM" else ["private"]
    machine.volumes = {name: volume(name) for name in names}
    app.domains[name] = machine
    made.append(machine)
    return machine


app.add_new_vm = add_new_vm
errors = []
with tempfile.TemporaryDirectory() as folder:
    backup = restore.BackupRestore(app, sys.argv[2], None, "secret", tmpdir=folder)
    backup.options.dom0_home = False
    backup.options.rename_conflicting = False
    backup.check_disk_space = lambda: None
    backup.log.error = lambda *text: errors.append(text)
    backup.restore_do(backup.get_restore_info())
for machine in made:
    volumes = [
        f"{name} {one.import_data.called or one.import_data_with_size.called}"
        for name, one in machine.volumes.items()
    ]
    print(f"{machine.name} {machine.klass}: {', '.join(volumes)}")
print(f"errors: {len(errors)}")
if errors:
    print(errors, file=sys.stderr)
