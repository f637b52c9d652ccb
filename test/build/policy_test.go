package build

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// signer signs images in a registry as 'cosign sign --key' does.
type signer struct {
	key *ecdsa.PrivateKey
	pub string // file
}

func newSigner(t *testing.T, dir string) signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	file := dir + "/signer.pub"
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o644); err != nil {
		t.Fatal(err)
	}
	return signer{k, file}
}

func (s signer) sign(t *testing.T, ref string) {
	t.Helper()
	n, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	d, err := remote.Head(n)
	if err != nil {
		t.Fatal(err)
	}
	payload := fmt.Appendf(nil, `{"critical":{"identity":{"docker-reference":""},"image":{"docker-manifest-digest":%q},"type":"cosign container image signature"},"optional":null}`, d.Digest.String())
	sum := sha256.Sum256(payload)
	sig, err := ecdsa.SignASN1(rand.Reader, s.key, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	art, err := mutate.Append(mutate.MediaType(empty.Image, types.OCIManifestSchema1), mutate.Addendum{
		Layer:       static.NewLayer(payload, "application/vnd.dev.cosign.simplesigning.v1+json"),
		Annotations: map[string]string{"dev.cosignproject.cosign/signature": base64.StdEncoding.EncodeToString(sig)},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(n.Context().Tag(strings.Replace(d.Digest.String(), ":", "-", 1)+".sig"), art); err != nil {
		t.Fatal(err)
	}
}

// TestBuildPolicy holds the policy's rules about images before whatever a build takes
// of an image that is not its own, by each way to build.
func TestBuildPolicy(t *testing.T) {
	e := start(t, "")
	reg := startRegistry(t)
	for _, n := range []string{"signed", "unsigned", "denied"} {
		e.must("build", "-t", reg+"/"+n+":1", "--push", e.context(map[string]string{"Dockerfile": "FROM bb\nRUN echo " + n + " > /made\n"}))
	}
	s := newSigner(t, e.Dir)
	s.sign(t, reg+"/signed:1")
	e.must("tag", "bb", "evil")
	id := strings.TrimPrefix(e.must("images", "inspect", "--format", "{{.Id}}", "evil"), "sha256:")
	e.must("rmi", "--force", "bb", reg+"/signed:1", reg+"/unsigned:1", reg+"/denied:1")
	e.must("builder", "prune", "--all", "--force")
	e.Kill()
	policy := fmt.Sprintf("version: 1\nrules:\n  - name: names\n    images: {deny: ['%s/denied:*', evil]}\n  - name: signatures\n    when: {images: ['%s/**']}\n    images:\n      signedBy: [{key: %s}]\n", reg, reg, s.pub)
	if err := os.WriteFile(e.Dir+"/policy.yaml", []byte(policy), 0o600); err != nil {
		t.Fatal(err)
	}
	e.Config = "policy: " + e.Dir + "/policy.yaml\n"
	e.Boot()

	const notSigned, denied = `policy rule "signatures" refuses image`, `policy rule "names" refuses image`
	for _, x := range []struct{ dockerfile, want string }{
		{"FROM " + reg + "/signed:1\nRUN test -f /made\n", ""},
		{"FROM scratch\nCOPY --from=" + reg + "/signed:1 /made /made\n", ""},
		{"FROM " + reg + "/unsigned:1\nRUN true\n", notSigned},
		{"FROM " + reg + "/denied:1\n", denied},
		{"FROM evil\nRUN true\n", denied},
		{"FROM " + id[:12] + "\nRUN true\n", denied},
		{"FROM scratch\nCOPY --from=" + reg + "/unsigned:1 /made /made\n", notSigned},
		{"FROM " + reg + "/signed:1\nRUN --mount=type=bind,from=" + reg + "/unsigned:1,target=/m cat /m/made\n", notSigned},
		{"# syntax=" + reg + "/unsigned:1\nFROM scratch\nCOPY Dockerfile /\n", notSigned},
	} {
		ctx := e.context(map[string]string{"Dockerfile": x.dockerfile})
		for how, build := range map[string]func(...string) result{
			"session": func(a ...string) result { return e.servin(append([]string{"build"}, a...)...) }, "upload": e.classic,
		} {
			r := build(ctx)
			switch {
			case x.want == "" && r.code != 0:
				t.Errorf("%s of %q: %s", how, x.dockerfile, r)
			case x.want != "" && (r.code == 0 || !strings.Contains(r.all(), x.want)):
				t.Errorf("%s of %q: %s, want %s", how, x.dockerfile, r, x.want)
			}
		}
	}
	// What was refused was not fetched.
	if out := e.must("images", "--all"); strings.Contains(out, "unsigned") || strings.Contains(out, "denied") {
		t.Error(out)
	}
}
