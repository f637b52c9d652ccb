package gpt

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func file(t *testing.T, sectors int64) *os.File {
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(sectors * Sector); err != nil {
		t.Fatal(err)
	}
	return f
}

func table() *Table {
	return &Table{Disk: GUID{1}, Partitions: []Partition{
		{Type: ESP, ID: GUID{2}, First: 2048, Last: 4095, Name: "esp"},
		{Type: LinuxData, ID: GUID{3}, First: 4096, Last: 8191, Name: "cloudos-data"},
	}}
}

func TestWriteReadGrow(t *testing.T) {
	const sectors = 16384
	f := file(t, sectors)
	want := table()
	if err := want.Write(f, sectors); err != nil {
		t.Fatal(err)
	}
	got, err := Read(f, sectors)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("%+v, %v", got, err)
	}
	if path, err := exec.LookPath("sfdisk"); err == nil {
		out, err := exec.Command(path, "--verify", f.Name()).CombinedOutput()
		if err != nil || !strings.Contains(string(out), "No errors detected") {
			t.Errorf("sfdisk: %v: %s", err, out)
		}
	}
	// A damaged table is read from its copy.
	f.WriteAt(make([]byte, Sector), Sector)
	if got, err = Read(f, sectors); err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("the copy: %+v, %v", got, err)
	}
	// The disk grows: the copy is no longer at its end, and the last partition gets the rest.
	want.Write(f, sectors)
	f.Truncate(4 * sectors * Sector)
	if got, err = Read(f, 4*sectors); err != nil {
		t.Fatal(err)
	}
	if got.Grow("other", 4*sectors) || !got.Grow("cloudos-data", 4*sectors) || got.Grow("cloudos-data", 4*sectors) {
		t.Fatal("it grew wrongly")
	}
	if err := got.Write(f, 4*sectors); err != nil {
		t.Fatal(err)
	}
	if got, err = Read(f, 4*sectors); err != nil || got.Partitions[1].Last != 4*sectors-2048-1 {
		t.Fatalf("%+v, %v", got, err)
	}
	over := table()
	over.Partitions[1].Last = sectors - 1
	if err := over.Write(f, sectors); err == nil {
		t.Fatal("a partition over the disk's end was written")
	}
}

func FuzzRead(f *testing.F) {
	b := make([]byte, 16384*Sector)
	w := bytes.NewBuffer(nil)
	_ = w
	table().Write(writerAt(b), 16384)
	f.Add(b[:FirstUsable*Sector])
	f.Fuzz(func(t *testing.T, head []byte) {
		disk := make([]byte, 256*Sector)
		copy(disk, head)
		Read(bytes.NewReader(disk), 256)
	})
}

type writerAt []byte

func (w writerAt) WriteAt(p []byte, at int64) (int, error) { return copy(w[at:], p), nil }

func TestGUID(t *testing.T) {
	if got := ESP.String(); got != "c12a7328-f81f-11d2-ba4b-00a0c93ec93b" {
		t.Errorf("it is %s", got)
	}
	if g, err := ParseGUID("C12A7328-F81F-11d2-BA4B-00A0C93EC93B"); err != nil || g != ESP {
		t.Errorf("it is %s, %v", g, err)
	}
	for _, bad := range []string{"", "c12a7328", "c12a7328f81f11d2ba4b00a0c93ec93b", "c12a7328-f81f-11d2-ba4b00a0c93ec93b-", "g12a7328-f81f-11d2-ba4b-00a0c93ec93b", ESP.String() + "00"} {
		if g, err := ParseGUID(bad); err == nil {
			t.Errorf("%q is %s", bad, g)
		}
	}
}
