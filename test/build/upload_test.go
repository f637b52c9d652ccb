package build

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"regexp"
	"testing"
	"time"
)

// TestUploadsDifferByContent: two contexts whose files have the same names, sizes and
// times are not taken for one another, nor are two Dockerfiles; equal ones are.
func TestUploadsDifferByContent(t *testing.T) {
	e := start(t, "")
	at := time.Now().Truncate(time.Second)
	build := func(dockerfile, file string) string {
		t.Helper()
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for name, text := range map[string]string{"Dockerfile": dockerfile, "file": file} {
			if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(text)), ModTime: at}); err != nil {
				t.Fatal(err)
			}
			_, _ = io.WriteString(w, text)
		}
		_ = w.Close()
		resp, err := e.HTTP().Post("http://engine/build?t=upload", "application/x-tar", &b)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		said, _ := io.ReadAll(resp.Body)
		m := regexp.MustCompile(`sha256:[0-9a-f]{64}`).Find(said)
		if m == nil {
			t.Fatalf("nothing was built: %s", said)
		}
		return string(m)
	}
	const dockerfile = "FROM scratch\nCOPY file /file\nLABEL n=%d\n"
	one := build(fmt.Sprintf(dockerfile, 1), "foo")
	if again := build(fmt.Sprintf(dockerfile, 1), "foo"); again != one {
		t.Error("equal contexts gave different images")
	}
	if other := build(fmt.Sprintf(dockerfile, 1), "bar"); other == one {
		t.Error("another file of the same size and time was not seen")
	}
	if other := build(fmt.Sprintf(dockerfile, 2), "foo"); other == one {
		t.Error("another Dockerfile of the same size and time was not seen")
	}
}
