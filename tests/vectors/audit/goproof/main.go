// Goproof verifies a .tlog-proof receipt with the Go checksum-database libraries.
//
//	goproof VKEY RECEIPT ENTRY
package main

import (
	"encoding/base64"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

func fail(err interface{}) {
	fmt.Println("BAD", err)
	os.Exit(1)
}

func decode(text string) tlog.Hash {
	var hash tlog.Hash
	data, err := base64.StdEncoding.DecodeString(text)
	if err != nil || len(data) != tlog.HashSize {
		fail("not a hash")
	}
	copy(hash[:], data)
	return hash
}

func main() {
	verifier, err := note.NewVerifier(os.Args[1])
	if err != nil {
		fail(err)
	}
	receipt, err := os.ReadFile(os.Args[2])
	if err != nil {
		fail(err)
	}
	entry, err := os.ReadFile(os.Args[3])
	if err != nil {
		fail(err)
	}
	parts := strings.SplitN(string(receipt), "\n\n", 2)
	if len(parts) != 2 {
		fail("no checkpoint")
	}
	lines := strings.Split(parts[0], "\n")
	if lines[0] != "c2sp.org/tlog-proof@v1" || !strings.HasPrefix(lines[1], "index ") {
		fail("not a tlog-proof")
	}
	index, err := strconv.ParseInt(lines[1][6:], 10, 64)
	if err != nil {
		fail(err)
	}
	var proof tlog.RecordProof
	for _, line := range lines[2:] {
		proof = append(proof, decode(line))
	}
	opened, err := note.Open([]byte(parts[1]), note.VerifierList(verifier))
	if err != nil {
		fail(err)
	}
	head := strings.Split(opened.Text, "\n")
	size, err := strconv.ParseInt(head[1], 10, 64)
	if err != nil {
		fail(err)
	}
	if err := tlog.CheckRecord(proof, size, decode(head[2]), index, tlog.RecordHash(entry)); err != nil {
		fail(err)
	}
	fmt.Println("OK", index)
}
