package layout

import (
	"archive/tar"
	"bytes"
	"errors"
	"os"
	"testing"
)

type budget struct{ left int64 }

var errSpent = errors.New("spent")

func (b *budget) Take(n int64) error {
	if b.left -= n; b.left < 0 {
		return errSpent
	}
	return nil
}

func pack(t testing.TB, files ...string) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for i := 0; i < len(files); i += 2 {
		err := tw.WriteHeader(&tar.Header{Name: files[i], Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(files[i+1]))})
		_, werr := tw.Write([]byte(files[i+1]))
		if err := errors.Join(err, werr); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

const empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

func TestBounds(t *testing.T) {
	if _, err := Read(bytes.NewReader(pack(t, "blobs/sha256/"+empty, "")), t.TempDir(), &budget{1 << 20}); err == nil {
		t.Error("an image without an index")
	}
	if _, err := Read(bytes.NewReader(pack(t, "index.json", "{}", "blobs/sha256/"+empty, "", "./blobs//sha256/"+empty, "")), t.TempDir(), &budget{1 << 20}); err == nil {
		t.Error("a blob twice")
	}
	big := pack(t, "index.json", "{}", "blobs/sha256/"+empty, string(make([]byte, 2<<20)))
	if _, err := Read(bytes.NewReader(big), t.TempDir(), &budget{1 << 20}); !errors.Is(err, errSpent) {
		t.Errorf("beyond the budget: %v", err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add(pack(f, "index.json", `{"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:`+empty+`","size":0}]}`, "blobs/sha256/"+empty, ""))
	f.Add(pack(f, "index.json", `{"manifests":[{"mediaType":"application/vnd.oci.image.index.v1+json","digest":"sha256:`+empty+`"}]}`, "../../x", "y"))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir, err := os.MkdirTemp("", "servin-layout-")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		_, _ = Read(bytes.NewReader(b), dir, &budget{1 << 20})
	})
}
