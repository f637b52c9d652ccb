package osimage

import (
	"bytes"
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cloudos-io/cloudos/internal/osimage"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// TestWrongConfigurationInImage is refused when the image is built, before anything is fetched.
func TestWrongConfigurationInImage(t *testing.T) {
	for name, c := range map[string]struct{ doc, want string }{
		"unknown field":  {"version: 1\nhostnam: x\n", "hostnam"},
		"no version":     {"hostname: x\n", "version"},
		"two documents":  {"version: 1\n---\nversion: 1\n", "one document"},
		"engine's field": {"version: 1\nengine: {nonsense: 1}\n", "engine"},
		"too big":        {"version: 1\n#" + strings.Repeat("x", 1<<20), "larger"},
	} {
		out := filepath.Join(t.TempDir(), "out")
		_, err := osimage.Build(t.Context(), osimage.Options{Arch: "amd64", Format: "vm", Output: out, Cache: out, Config: []byte(c.doc), Log: t.Logf})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := os.Stat(out); err == nil {
			t.Errorf("%s: something was written", name)
		}
	}
}

// TestConfigurationInImage boots an image that carries its configuration: it is used where no
// other place has one, and it alone.
func TestConfigurationInImage(t *testing.T) {
	long(t)
	const doc = "version: 1\nhostname: from-image\nsysctl: {vm.swappiness: \"7\"}\n"
	image := build(t, "vm", func(o *osimage.Options) { o.Config = []byte(doc) })
	in, err := osimage.Inspect(image)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if in.Print(&b, 5); !strings.Contains(b.String(), "  | hostname: from-image\n") {
		t.Fatalf("inspect says\n%s", b.String())
	}
	data := disk(t, 2<<30)
	boot := func(words, source, hostname string) {
		t.Helper()
		m := vm(t, image, data, words)
		if s := m.settled(); s.State != vmwire.StateReady || s.ConfigSource != source || s.Hostname != hostname || len(s.Problems) > 0 {
			t.Fatalf("the machine is %+v", s)
		}
		if source == "image" {
			if err := m.ctl("PUT", "/v1/config", "version: 1\nhostname: from-disk\n", nil); err != nil {
				t.Fatal(err)
			}
		}
		m.off()
	}
	boot("cloudos.config=base64:"+base64.StdEncoding.EncodeToString([]byte("version: 1\nhostname: from-words\n")), "cmdline", "from-words")
	boot("", "image", "from-image")
	boot("", "disk", "from-disk")
}
