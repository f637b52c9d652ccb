package lazy

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/cloudos-io/cloudos/internal/fault"
)

const sum = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

func table(entries ...string) []byte {
	return []byte(`{"version":1,"entries":[` + strings.Join(entries, ",") + `]}`)
}

func TestHostileTables(t *testing.T) {
	for _, c := range []struct {
		name string
		kind fault.Kind
		raw  []byte
	}{
		{"no object", fault.Invalid, []byte(`[]`)},
		{"cut off", fault.Invalid, []byte(`{"entries":[{"name":"a","type":"dir"}`)},
		{"climbs", fault.Invalid, table(`{"name":"../a","type":"dir"}`)},
		{"root is a file", fault.Invalid, table(`{"name":"/","type":"reg"}`)},
		{"zero byte", fault.Invalid, table(`{"name":"a\u0000b","type":"dir"}`)},
		{"long name", fault.Invalid, table(`{"name":"` + strings.Repeat("x", 300) + `","type":"dir"}`)},
		{"deep", fault.Invalid, table(`{"name":"` + strings.Repeat("x/", 1500) + `","type":"dir"}`)},
		{"a kind nobody knows", fault.Invalid, table(`{"name":"a","type":"socket"}`)},
		{"forged whiteout", fault.Invalid, table(`{"name":"a","type":"char"}`)},
		{"whiteout of nothing", fault.Invalid, table(`{"name":".wh.","type":"reg"}`)},
		{"chunk without file", fault.Invalid, table(`{"type":"chunk"}`)},
		{"negative size", fault.Invalid, table(`{"name":"a","type":"reg","size":-1}`)},
		{"chunk outside", fault.Invalid, table(`{"name":"a","type":"reg","size":5,"offset":5000,"chunkDigest":"` + sum + `"}`)},
		{"hole between chunks", fault.Invalid, table(`{"name":"a","type":"reg","size":5,"offset":5,"chunkSize":2,"chunkDigest":"`+sum+`"}`, `{"type":"chunk","offset":9,"chunkOffset":3,"chunkSize":2,"chunkDigest":"`+sum+`"}`)},
		{"too few chunks", fault.Invalid, table(`{"name":"a","type":"reg","size":5,"offset":5,"chunkSize":2,"chunkDigest":"` + sum + `"}`)},
		{"no digest", fault.Unsupported, table(`{"name":"a","type":"reg","size":5,"offset":5}`)},
		{"huge chunk", fault.Unsupported, table(`{"name":"a","type":"reg","size":1000000000,"offset":5,"chunkDigest":"` + sum + `"}`)},
		{"link to below", fault.Unsupported, table(`{"name":"a","type":"hardlink","linkName":"b"}`)},
		{"link to a directory", fault.Invalid, table(`{"name":"d","type":"dir"}`, `{"name":"a","type":"hardlink","linkName":"d"}`)},
		{"below a file", fault.Unsupported, table(`{"name":"a","type":"reg"}`, `{"name":"a/b","type":"reg"}`)},
		{"twice", fault.Unsupported, table(`{"name":"a","type":"reg"}`, `{"name":"a","type":"symlink","linkName":"x"}`)},
		{"wrong owner", fault.Invalid, table(`{"name":"a","type":"reg","uid":-1}`)},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := parseTable(c.raw, 1000, false); !fault.Is(err, c.kind) {
				t.Errorf("error %v, want kind %v", err, c.kind)
			}
		})
	}
}

func TestTableKeepsOverlayMarksOut(t *testing.T) {
	x, err := json.Marshal(map[string][]byte{"trusted.overlay.redirect": []byte("/etc"), "user.overlay.opaque": []byte("y"), "user.ok": []byte("1")})
	if err != nil {
		t.Fatal(err)
	}
	tr, err := parseTable(table(`{"name":"a","type":"dir","xattrs":`+string(x)+`}`), 1000, false)
	if err != nil {
		t.Fatal(err)
	}
	if n := tr.find("a"); len(n.xattrs) != 1 || n.xattrs["user.ok"] == nil {
		t.Errorf("attributes %v", n.xattrs)
	}
}

func FuzzTable(f *testing.F) {
	f.Add(table(`{"name":"a/","type":"dir"}`, `{"name":"a/.wh.b","type":"reg"}`, `{"name":"a/f","type":"reg","size":5,"offset":5,"chunkDigest":"`+sum+`"}`, `{"name":"h","type":"hardlink","linkName":"a/f"}`))
	f.Add(table(`{"name":"x/.wh..wh..opq","type":"reg"}`, `{"name":"d","type":"char","devMajor":1,"devMinor":3}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		tr, err := parseTable(raw, 1<<20, true)
		if err != nil {
			return
		}
		// Every directory can be left, and no name leads out.
		for _, n := range tr.nodes {
			if n.dir() && n.parent == nil {
				t.Fatal("a directory without a way up")
			}
			for _, name := range n.names {
				if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
					t.Fatalf("name %q", name)
				}
			}
		}
	})
}
