// Compiles formats/archive.ksy and reads archives with what comes of it: node check.js KSY ARCHIVE...
// Checks what the description cannot say itself: that records follow each other, and that what is inside fills what is around it.
'use strict';
const fs = require('fs');
const vm = require('vm');
const YAML = require('yaml');
const Compiler = require('kaitai-struct-compiler');
const KaitaiStream = require('kaitai-struct/KaitaiStream');

const HEADER_BYTES = 96;
const BLOCK_BYTES = 4096;

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

function checkPack(pack, n) {
  let end = 0;
  for (const { block, numBlocks, storedLength, encoding } of pack.table) {
    must(block >= end, `frames of record ${n} overlap`);
    must(encoding === 1 ? storedLength <= numBlocks * BLOCK_BYTES : storedLength === numBlocks * BLOCK_BYTES, `a frame of record ${n} has a wrong length`);
    end = block + numBlocks;
  }
  must(pack.table[0].block === 0 && pack.numBlocks === end, `frames of record ${n} do not fill it`);
  must(pack.padding.every((byte) => byte === 0), `the padding of record ${n} is not zeros`);
}

function check(Archive, path) {
  const bytes = fs.readFileSync(path);
  const stream = new KaitaiStream(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
  const { records } = new Archive(stream);
  const commits = [];
  const sequences = {};
  let offset = 0;
  records.forEach((record, n) => {
    const { header } = record;
    const body = record.sealedBody || record.body;
    const name = Archive.Kind[header.kind] || header.kind;
    const length = HEADER_BYTES + header.bodyLength;
    const lane = Buffer.from(header.archive).toString('hex');
    const parsed = body && body._io;
    console.log(`${offset} ${name} ${header.bodyLength}${parsed ? '' : ' not described'}`);
    must(!(header.sequence <= sequences[lane]), `record ${n} has the number ${header.sequence}`);
    sequences[lane] = header.sequence;
    if (name === 'COMMIT') commits.push({ length, hash: Buffer.from(header.bodyHash) });
    if (parsed && name !== 'HEAD') must(body._io.isEof(), `record ${n} has bytes behind its content`);
    if (parsed && name === 'PACK' && !header.sealed) checkPack(body, n);
    if (parsed && name === 'KEY') must(body.padding.every((byte) => byte === 0), `the padding of record ${n} is not zeros`);
    if (name === 'TAIL') {
      const last = commits[commits.length - 1];
      for (const copy of body.copies) {
        const same = last && copy.length === last.length && Buffer.from(copy.bodyHash).equals(last.hash);
        must(same, `record ${n} does not point to the last COMMIT`);
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
