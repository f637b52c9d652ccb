package image

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/distribution/reference"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// FuzzManifest reads anything as manifest, index and config: no panic, and what
// is accepted keeps to the bounds.
func FuzzManifest(f *testing.F) {
	d := digest.FromString("x")
	m, _ := json.Marshal(ocispec.Manifest{Config: ocispec.Descriptor{Digest: d, Size: 1}, Layers: []ocispec.Descriptor{{Digest: d, Size: 2, URLs: []string{"http://localhost/"}}}})
	f.Add(m)
	i, _ := json.Marshal(ocispec.Index{Manifests: []ocispec.Descriptor{{Digest: d, Size: 3, Platform: &ocispec.Platform{OS: "linux", Architecture: "amd64"}}}})
	f.Add(i)
	f.Add([]byte(`{"schemaVersion":1,"fsLayers":[{"blobSum":"x"}]}`))
	f.Add([]byte(`{"rootfs":{"type":"layers","diff_ids":["` + d.String() + `"]},"config":{"Healthcheck":{"Test":["NONE"]}}}`))
	f.Add([]byte(`{"layers":[{"digest":"sha256:../../etc","size":-1}]}`))
	f.Add([]byte(strings.Repeat("[", 20000)))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := parseManifest(b); err == nil {
			for _, l := range append(m.Layers, m.Config) {
				if l.Digest.Validate() != nil || l.Size < 0 || len(l.URLs) > 0 {
					t.Errorf("accepted %+v", l)
				}
			}
			if img, err := parseConfig(b); err == nil {
				if v, err := newVariant(ocispec.Descriptor{Digest: d}, m, img); err == nil {
					_ = v.chainID()
					_ = stack(v.layers, v.diffIDs)
				}
			}
		}
		if idx, err := parseIndex(b); err == nil {
			if c, err := choose(idx, ""); err == nil && c.Digest.Validate() != nil {
				t.Errorf("chose %+v", c)
			}
		}
	})
}

// FuzzReference looks up and names anything.
func FuzzReference(f *testing.F) {
	for _, s := range []string{"a", "a:b", "h:5000/a/b:c", "a@" + digest.FromString("x").String(), "sha256:00", "DEADBEEF", "..", "a/../b", "\x00", danglingName + "x"} {
		f.Add(s)
	}
	s := &Service{}
	s.cat.load(nil)
	f.Fuzz(func(t *testing.T, ref string) {
		_, err := s.find(t.Context(), ref)
		if err == nil {
			t.Fatalf("found %q in an empty store", ref)
		}
		if n, err := reference.ParseNormalizedNamed(ref); err == nil {
			if name := s.recordName(n); isDangling(name) || name == "" {
				t.Fatalf("%q is recorded as %q", ref, name)
			}
		}
	})
}

// FuzzChanges applies anything as a change of a config.
func FuzzChanges(f *testing.F) {
	for _, c := range []string{`CMD ["a"]`, "ENV a=b c='d e'", "HEALTHCHECK --interval=1s CMD x", `LABEL "a b"=c\`, "EXPOSE 80/tcp", "SHELL []", "VOLUME [\"/x\"]"} {
		f.Add(c)
	}
	f.Fuzz(func(t *testing.T, c string) {
		var conf dockerspec.DockerOCIImageConfig
		if err := change(&conf, []string{c, c}); err == nil {
			if _, err := json.Marshal(conf); err != nil {
				t.Fatal(err)
			}
		}
	})
}
