package verity

import (
	"bytes"
	"encoding/hex"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
)

// TestAppend has veritysetup check trees of several heights, and find a changed byte.
func TestAppend(t *testing.T) {
	tool, err := exec.LookPath("veritysetup")
	if err != nil {
		t.Skip("SKIP: veritysetup is not installed")
	}
	for _, blocks := range []int{2, fanout, fanout + 1, fanout*fanout + 3} {
		t.Run(strconv.Itoa(blocks), func(t *testing.T) {
			data := make([]byte, blocks*Block)
			src := rand.NewChaCha8([32]byte{byte(blocks)})
			src.Read(data)
			p := filepath.Join(t.TempDir(), "d")
			var tree bytes.Buffer
			root, err := Append(&tree, bytes.NewReader(data), [16]byte{1})
			if err != nil {
				t.Fatal(err)
			}
			check := func() ([]byte, error) {
				f, err := os.Create(p)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				io.Copy(f, bytes.NewReader(data))
				io.Copy(f, bytes.NewReader(tree.Bytes()))
				return exec.Command(tool, "verify", p, p, hex.EncodeToString(root.Hash[:]), "--hash-offset", strconv.Itoa(blocks*Block)).CombinedOutput()
			}
			if out, err := check(); err != nil {
				t.Fatalf("veritysetup: %v\n%s", err, out)
			}
			data[len(data)/2] ^= 1
			if out, err := check(); err == nil {
				t.Fatalf("a changed byte passed: %s", out)
			}
		})
	}
	if _, err := Append(io.Discard, bytes.NewReader(make([]byte, Block+1)), [16]byte{}); err == nil {
		t.Error("data of half a block were taken")
	}
}
