// Gocheck verifies a log folder with the Go checksum-database libraries, which share no code with the log's writer.
//
//	gocheck VKEY FOLDER [OLD_CHECKPOINT]
//
// It opens the checkpoint as a signed note, reads every bundle, tile by tile recomputes the tree with tlog.StoredHashes,
// compares every tile on disk, checks an inclusion proof of a spread of records and a tree proof from the old checkpoint.
package main

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

func fail(entry int64, format string, args ...interface{}) {
	fmt.Printf("BAD entry %d: %s\n", entry, fmt.Sprintf(format, args...))
	os.Exit(1)
}

type head struct {
	size int64
	root tlog.Hash
}

func open(path string, verifier note.Verifier) head {
	data, err := os.ReadFile(path)
	if err != nil {
		fail(0, "%v", err)
	}
	opened, err := note.Open(data, note.VerifierList(verifier))
	if err != nil {
		fail(0, "%s: %v", filepath.Base(path), err)
	}
	lines := strings.Split(opened.Text, "\n")
	if len(lines) != 4 || lines[0] != verifier.Name() {
		fail(0, "%s is not a checkpoint of this log", filepath.Base(path))
	}
	size, err := strconv.ParseInt(lines[1], 10, 64)
	if err != nil {
		fail(0, "%v", err)
	}
	root, err := base64.StdEncoding.DecodeString(lines[2])
	if err != nil || len(root) != tlog.HashSize {
		fail(0, "bad root")
	}
	var hash tlog.Hash
	copy(hash[:], root)
	return head{size, hash}
}

func path(index int64, width int64) string {
	name := fmt.Sprintf("%03d", index%1000)
	for index >= 1000 {
		index /= 1000
		name = fmt.Sprintf("x%03d/%s", index%1000, name)
	}
	if width < 256 {
		name = fmt.Sprintf("%s.p/%d", name, width)
	}
	return name
}

func main() {
	verifier, err := note.NewVerifier(os.Args[1])
	if err != nil {
		fail(0, "%v", err)
	}
	root := os.Args[2]
	checkpoint := open(filepath.Join(root, "checkpoint"), verifier)

	var hashes []tlog.Hash
	reader := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		found := make([]tlog.Hash, len(indexes))
		for i, index := range indexes {
			found[i] = hashes[index]
		}
		return found, nil
	})
	var records []tlog.Hash
	for n := int64(0); n < checkpoint.size; {
		width := checkpoint.size - n
		if width > 256 {
			width = 256
		}
		data, err := os.ReadFile(filepath.Join(root, "tile/entries", path(n/256, width)))
		if err != nil {
			fail(n, "%v", err)
		}
		tile, err := os.ReadFile(filepath.Join(root, "tile/0", path(n/256, width)))
		if err != nil || int64(len(tile)) != width*tlog.HashSize {
			fail(n, "level 0 tile missing or of a wrong size")
		}
		for i := int64(0); i < width; i++ {
			if len(data) < 2 || len(data) < 2+int(binary.BigEndian.Uint16(data)) {
				fail(n, "bundle cut short")
			}
			entry := data[2 : 2+int(binary.BigEndian.Uint16(data))]
			data = data[2+len(entry):]
			record := tlog.RecordHash(entry)
			if !bytes.Equal(record[:], tile[i*tlog.HashSize:(i+1)*tlog.HashSize]) {
				fail(n, "entry and tile differ")
			}
			stored, err := tlog.StoredHashes(n, entry, reader)
			if err != nil {
				fail(n, "%v", err)
			}
			hashes = append(hashes, stored...)
			records = append(records, record)
			n++
		}
		if len(data) != 0 {
			fail(n, "bundle has more than its entries")
		}
	}
	computed, err := tlog.TreeHash(checkpoint.size, reader)
	if err != nil || computed != checkpoint.root {
		fail(checkpoint.size, "root differs from the checkpoint")
	}
	for _, tile := range tlog.NewTiles(8, 0, checkpoint.size) {
		if tile.W < 256 && int64(tile.W) != checkpoint.size>>(8*uint(tile.L))-tile.N*256 {
			continue // NewTiles lists every width on the way; a log need only keep the one of its checkpoint
		}
		expected, err := tlog.ReadTileData(tile, reader)
		if err != nil {
			fail(0, "%v", err)
		}
		found, err := os.ReadFile(filepath.Join(root, "tile", strconv.Itoa(tile.L), path(tile.N, int64(tile.W))))
		if err != nil || !bytes.Equal(found, expected) {
			fail(tile.N*256<<(8*uint(tile.L)), "tile %d/%d differs", tile.L, tile.N)
		}
	}
	for n := int64(0); n < checkpoint.size; n += 1 + checkpoint.size/16 {
		proof, err := tlog.ProveRecord(checkpoint.size, n, reader)
		if err != nil || tlog.CheckRecord(proof, checkpoint.size, checkpoint.root, n, records[n]) != nil {
			fail(n, "inclusion proof")
		}
	}
	if len(os.Args) > 3 {
		old := open(os.Args[3], verifier)
		if old.size > checkpoint.size {
			fail(checkpoint.size, "the log is shorter than the checkpoint kept elsewhere")
		}
		proof, err := tlog.ProveTree(checkpoint.size, old.size, reader)
		if err != nil || tlog.CheckTree(proof, checkpoint.size, checkpoint.root, old.size, old.root) != nil {
			fail(old.size, "the log conflicts with the checkpoint kept elsewhere")
		}
	}
	fmt.Printf("OK %d %x\n", checkpoint.size, checkpoint.root)
}
