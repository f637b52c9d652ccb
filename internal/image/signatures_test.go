package image

import (
	"context"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	gregistry "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	gtypes "github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/cloudos-io/cloudos/internal/fault"
)

const simpleType = "application/vnd.dev.cosign.simplesigning.v1+json"

func artifact(t testing.TB, data []byte, mediaType string) v1.Image {
	t.Helper()
	img, err := mutate.Append(mutate.MediaType(empty.Image, gtypes.OCIManifestSchema1), mutate.Addendum{
		Layer: static.NewLayer(data, gtypes.MediaType(mediaType)), Annotations: map[string]string{"k": "v"},
	})
	if err != nil {
		t.Fatal(err)
	}
	return mutate.ConfigMediaType(img, gtypes.MediaType(mediaType))
}

// attach puts an artifact beside an image, under a tag, or as a referrer for "".
func attach(t testing.TB, ref string, img v1.Image, suffix string, data []byte) {
	t.Helper()
	n, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if suffix != "" {
		if err := remote.Write(n.Context().Tag(strings.Replace(d.String(), ":", "-", 1)+suffix), artifact(t, data, simpleType)); err != nil {
			t.Fatal(err)
		}
		return
	}
	desc, err := remote.Get(n)
	if err != nil {
		t.Fatal(err)
	}
	art := mutate.Subject(artifact(t, data, bundleType+".v0.3+json"), desc.Descriptor).(v1.Image)
	ad, err := art.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(n.Context().Digest(ad.String()), art); err != nil {
		t.Fatal(err)
	}
}

// TestSignaturesFound looks in a registry that knows referrers and in one that does not.
func TestSignaturesFound(t *testing.T) {
	modern := httptest.NewServer(gregistry.New(gregistry.Logger(log.New(io.Discard, "", 0)), gregistry.WithReferrersSupport(true)))
	defer modern.Close()
	for kind, reg := range map[string]string{"modern": strings.TrimPrefix(modern.URL, "http://"), "older": startRegistry(t, nil)} {
		t.Run(kind, func(t *testing.T) {
			s := newService(t, t.TempDir())
			ref := reg + "/a/signed:1"
			img := randomImage(t, 512, 1)
			seed(t, ref, img)
			got, err := s.Signatures(t.Context(), ref, nil)
			if err != nil || len(got.Items) != 0 || len(got.Digests) != 1 {
				t.Fatalf("before any: %+v %v", got, err)
			}
			attach(t, ref, img, ".sig", []byte(`{"a":1}`))
			attach(t, ref, img, ".att", []byte(`{"b":2}`))
			attach(t, ref, img, "", []byte(`{"c":3}`))
			check := func(when string) {
				t.Helper()
				got, err := s.Signatures(t.Context(), ref, nil)
				if err != nil || len(got.Items) != 3 {
					t.Fatalf("%s: %+v %v", when, got, err)
				}
				for i, want := range []string{`{"a":1}`, `{"b":2}`, `{"c":3}`} {
					if it := got.Items[i]; string(it.Data) != want || it.Annotations["k"] != "v" || it.Found == "" {
						t.Errorf("%s: %+v, want %s", when, it, want)
					}
				}
			}
			check("by name")
			if err := s.Pull(t.Context(), PullOptions{Ref: ref}); err != nil {
				t.Fatal(err)
			}
			check("pulled")
			id := configID(t, img)
			ref = id.String()
			check("by id")
		})
	}
}

// TestSignaturesDistrusted has registries lie about them.
func TestSignaturesDistrusted(t *testing.T) {
	var lie func(w http.ResponseWriter, r *http.Request) bool
	reg := startRegistry(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if lie == nil || !lie(w, r) {
				next.ServeHTTP(w, r)
			}
		})
	})
	s := newService(t, t.TempDir())
	ref := reg + "/a/signed:1"
	img := randomImage(t, 512, 1)
	seed(t, ref, img)
	attach(t, ref, img, ".sig", []byte(`{"a":1}`))
	for what, l := range map[string]func(w http.ResponseWriter, r *http.Request) bool{
		"other bytes": func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
				_, _ = io.WriteString(w, `{"a":2}`)
				return true
			}
			return false
		},
		"an error": func(w http.ResponseWriter, r *http.Request) bool {
			if strings.HasSuffix(r.URL.Path, ".sig") {
				w.WriteHeader(http.StatusInternalServerError)
				return true
			}
			return false
		},
		"who are you": func(w http.ResponseWriter, r *http.Request) bool {
			if strings.Contains(r.URL.Path, "/blobs/") {
				w.WriteHeader(http.StatusForbidden)
				return true
			}
			return false
		},
	} {
		lie = l
		if got, err := s.Signatures(t.Context(), ref, nil); err == nil {
			t.Errorf("%s: %+v", what, got)
		}
	}
	lie = nil
	// What cannot be read does not hide what can.
	attach(t, ref, img, ".att", make([]byte, maxSignature+1))
	if got, err := s.Signatures(t.Context(), ref, nil); err != nil || len(got.Items) != 1 {
		t.Errorf("a good and a huge one: %d %v", len(got.Items), err)
	}
	ref = reg + "/a/huge:1"
	seed(t, ref, img)
	attach(t, ref, img, ".att", make([]byte, maxSignature+1))
	if _, err := s.Signatures(t.Context(), ref, nil); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("a huge one: %v", err)
	}
}

// TestAdmit stops a pull before its layers.
func TestAdmit(t *testing.T) {
	blobs := 0
	reg := startRegistry(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.Contains(r.URL.Path, "/blobs/") && r.Method == http.MethodGet {
				blobs++
			}
			next.ServeHTTP(w, r)
		})
	})
	s := newService(t, t.TempDir())
	ref := reg + "/a/one:1"
	img := randomImage(t, 512, 2)
	seed(t, ref, img)
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	var asked Admission
	refuse := func(_ context.Context, a Admission) error {
		asked = a
		return fault.New(fault.Forbidden, "not this one")
	}
	if err := s.Pull(t.Context(), PullOptions{Ref: ref, Admit: refuse}); !fault.Is(err, fault.Forbidden) || !strings.Contains(err.Error(), "not this one") {
		t.Errorf("refused: %v", err)
	}
	if asked.Manifest.String() != d.String() || asked.Target != asked.Manifest || asked.Ref != ref {
		t.Errorf("asked about %+v", asked)
	}
	if blobs != 0 {
		t.Errorf("%d blobs were fetched", blobs)
	}
	if _, err := s.Inspect(t.Context(), ref, "", false); !fault.Is(err, fault.NotFound) {
		t.Errorf("it is here: %v", err)
	}
	if err := s.Pull(t.Context(), PullOptions{Ref: ref, Admit: func(context.Context, Admission) error { return nil }}); err != nil {
		t.Error(err)
	}
}
