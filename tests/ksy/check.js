// Compiles formats/archive.ksy and reads archives with what comes of it: node check.js KSY ARCHIVE...
// Checks what the description cannot say itself: that records follow each other, and that what is inside fills what is around it.
'use strict';
const fs = require('fs');
const vm = require('vm');
const YAML = require('yaml');
const Compiler = require('kaitai-struct-compiler');
const KaitaiStream = require('kaitai-struct/KaitaiStream');

const HEADER_BYTES = 96;

function must(holds, what) {
  if (!holds) throw new Error(what);
}

async function load(ksy) {
  const compiler = Compiler.compile ? Compiler : new Compiler();
  const files = await compiler.compile('javascript', YAML.parse(fs.readFileSync(ksy, 'utf8')), null, false);
  const module = { exports: {} };
  const names = { 'kaitai-struct/KaitaiStream': KaitaiStream };
  const wrapped = `(function (exports, require, module, define) {${Object.values(files)[0]}\n})`;
  vm.runInThisContext(wrapped)(module.exports, (name) => names[name], module, undefined);
  return module.exports.VmfoldArchive || module.exports;
}

function check(Archive, path) {
  const bytes = fs.readFileSync(path);
  const stream = new KaitaiStream(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
  const { records } = new Archive(stream);
  const commits = [];
  let offset = 0;
  records.forEach((record, n) => {
    const { header, body } = record;
    const name = Archive.Kind[header.kind];
    const length = HEADER_BYTES + header.bodyLength;
    console.log(`${offset} ${name} ${header.bodyLength}`);
    must(header.sequence === n, `record ${n} has the number ${header.sequence}`);
    must(Buffer.from(header.archive).equals(Buffer.from(records[0].header.archive)), `record ${n} is of another archive`);
    if (name === 'COMMIT') commits.push({ offset, length });
    if (name === 'PACK' || name === 'INDEX' || name === 'TAIL') must(body._io.isEof(), `record ${n} has bytes behind its content`);
    if (name === 'TAIL') {
      const last = commits[commits.length - 1];
      for (const copy of body.copies) {
        must(last && copy.offset === last.offset && copy.length === last.length, `record ${n} does not point to the last COMMIT`);
      }
    }
    offset += length;
  });
  must(offset === bytes.length, 'records do not fill the archive');
  must(commits.length > 0 && Archive.Kind[records[records.length - 1].header.kind] === 'TAIL', 'it does not end with a TAIL');
}

load(process.argv[2])
  .then((Archive) => process.argv.slice(3).forEach((path) => check(Archive, path)))
  .catch((error) => {
    console.error(String(error && error.message ? error.message : error));
    process.exit(1);
  });
