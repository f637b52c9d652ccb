package native

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// cosigner signs as 'cosign sign --key' does.
type cosigner struct {
	key *ecdsa.PrivateKey
	pub string // file
}

func newCosigner(t *testing.T, dir, name string) cosigner {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	file := dir + "/" + name + ".pub"
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o644); err != nil {
		t.Fatal(err)
	}
	return cosigner{k, file}
}

// sign puts a signature of the digest "of" beside the image; change may break the
// payload after it was signed.
func (c cosigner) sign(t *testing.T, ref string, img v1.Image, of string, change func([]byte) []byte) {
	t.Helper()
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if of == "" {
		of = d.String()
	}
	payload := fmt.Appendf(nil, `{"critical":{"identity":{"docker-reference":""},"image":{"docker-manifest-digest":%q},"type":"cosign container image signature"},"optional":null}`, of)
	sum := sha256.Sum256(payload)
	sig, err := ecdsa.SignASN1(rand.Reader, c.key, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		payload = change(payload)
	}
	art, err := mutate.Append(mutate.MediaType(empty.Image, types.OCIManifestSchema1), mutate.Addendum{
		Layer:       static.NewLayer(payload, "application/vnd.dev.cosign.simplesigning.v1+json"),
		Annotations: map[string]string{"dev.cosignproject.cosign/signature": base64.StdEncoding.EncodeToString(sig)},
	})
	if err != nil {
		t.Fatal(err)
	}
	n, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(n.Context().Tag(strings.Replace(d.String(), ":", "-", 1)+".sig"), art); err != nil {
		t.Fatal(err)
	}
}

// TestSignatures holds a policy's signatures before a pull fetches a layer and before
// a container is made, and what 'images verify' says of the same.
func TestSignatures(t *testing.T) {
	e := start(t)
	reg := startRegistry(t)
	mine, other := newCosigner(t, e.Dir, "mine"), newCosigner(t, e.Dir, "other")

	good, img := reg.push(t, "app/good:1", 1024, 2)
	mine.sign(t, good, img, "", nil)
	unsigned, uimg := reg.push(t, "app/unsigned:1", 1024, 2)
	wrong, wimg := reg.push(t, "app/wrong:1", 1024, 1)
	other.sign(t, wrong, wimg, "", nil)
	tampered, timg := reg.push(t, "app/tampered:1", 1024, 1)
	mine.sign(t, tampered, timg, "", func(b []byte) []byte { return bytes.Replace(b, []byte("null"), []byte("{ }"), 1) })
	replayed, rimg := reg.push(t, "app/replayed:1", 1024, 1)
	gd, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	mine.sign(t, replayed, rimg, gd.String(), nil)

	for ref, want := range map[string]string{
		good: "", unsigned: "no signature", wrong: "is not signed as wanted", tampered: "is not signed as wanted", replayed: "signature of another image",
	} {
		r := e.run("images", "verify", "--key", mine.pub, ref)
		if want == "" && (r.code != 0 || !strings.Contains(r.out, gd.String()+" signed by key sha256:")) || want != "" && (r.code == 0 || !strings.Contains(r.err, want)) {
			t.Errorf("verify %s: %s", ref, r)
		}
	}
	if r := e.run("images", "verify", "--key", other.pub, "--key", mine.pub, "--json", good); r.code != 0 || !json.Valid([]byte(r.out)) {
		t.Errorf("one of two keys: %s", r)
	}
	if r := e.run("images", "verify", "--key", mine.pub, "--attestation", "https://slsa.dev/provenance/v1", good); r.code == 0 {
		t.Errorf("a signature passed for an attestation: %s", r)
	}
	if r := e.run("images", "verify", "--identity", "x", good); r.code != 125 {
		t.Errorf("an identity without an issuer: %s", r)
	}

	// What is here already is held back at creation.
	e.must("pull", unsigned)
	e.must("tag", unsigned, "localname:1")
	path := e.Dir + "/policy.yaml"
	if err := os.WriteFile(path, []byte("version: 1\nrules:\n  - name: signed\n    when: {notImages: [bb]}\n    images: {signedBy: [{key: "+mine.pub+"}]}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	e.must("system", "shutdown")
	<-e.Exited
	e.Config = "policy: " + path + "\n"
	e.Boot()

	ud, err := uimg.Digest()
	if err != nil {
		t.Fatal(err)
	}
	for _, ref := range []string{unsigned, "localname:1", strings.TrimSuffix(unsigned, ":1") + "@" + ud.String()} {
		if r := e.run("create", ref, "x"); r.code == 0 || !strings.Contains(r.err, `policy rule "signed" refuses`) {
			t.Errorf("create %s: %s", ref, r)
		}
	}
	var layers int
	count := lie(func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/blobs/") {
			layers++
		}
		return false
	})
	for _, c := range []struct{ ref, want string }{{wrong, "signed"}, {tampered, "signed"}, {replayed, "another image"}} {
		if r := e.run("pull", c.ref); r.code == 0 || !strings.Contains(r.err, `policy rule "signed" refuses`) || !strings.Contains(r.err, c.want) {
			t.Errorf("pull %s: %s", c.ref, r)
		}
		if out := e.must("images", "-q", c.ref); out != "" {
			t.Errorf("%s is here all the same", c.ref)
		}
	}
	e.must("pull", good)
	// The registry is away: what was fetched with the image is kept, over a restart too.
	away := lie(func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(http.StatusBadGateway); return true })
	reg.set(away)
	e.Kill()
	e.Boot()
	e.must("create", "--name", "one", good, "x")
	if r := e.run("create", unsigned, "x"); r.code == 0 {
		t.Errorf("created while the registry is away: %s", r)
	}
	// Another key is another question.
	if err := os.WriteFile(mine.pub, must(os.ReadFile(other.pub)), 0o644); err != nil {
		t.Fatal(err)
	}
	if r := e.run("create", good, "x"); r.code == 0 {
		t.Errorf("created though the key changed: %s", r)
	}
	reg.set(count)
	if r := e.run("pull", wrong); r.code != 0 {
		t.Errorf("pull with its own key: %s", r)
	}
	if layers == 0 {
		t.Error("the count of layers counts nothing")
	}
	// A signer's file that is not there refuses everything.
	if err := os.Remove(mine.pub); err != nil {
		t.Fatal(err)
	}
	if r := e.run("create", wrong, "x"); r.code == 0 || !strings.Contains(r.err, "cannot read the signer's key") {
		t.Errorf("created without the key: %s", r)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// TestScan takes an inventory and asks for what is known, without a database.
func TestScan(t *testing.T) {
	e := start(t)
	t.Setenv("SERVIN_SCAN_CACHE", e.Dir+"/cache")
	out := e.must("images", "sbom", "bb")
	if !strings.Contains(out, "busybox") {
		t.Errorf("sbom: %s", out)
	}
	for _, f := range []string{"spdx-json", "cyclonedx-json", "syft-json"} {
		if out := e.must("images", "sbom", "--format", f, "bb"); !json.Valid([]byte(out)) || !strings.Contains(out, "busybox") {
			t.Errorf("%s: %.200s", f, out)
		}
	}
	if ents, err := os.ReadDir(e.Dir + "/cache/inventories"); err != nil || len(ents) != 1 {
		t.Errorf("kept inventories: %v %v", ents, err)
	}
	if r := e.run("images", "sbom", "--format", "xml", "bb"); r.code == 0 || !strings.Contains(r.err, "choose one of") {
		t.Errorf("a wrong format: %s", r)
	}
	if r := e.run("images", "scan", "bb"); r.code != 3 || !strings.Contains(r.err, "there is no vulnerability database: fetch one with") {
		t.Errorf("no database: %s", r)
	}
	if r := e.run("images", "sbom", "--no-cache", "--max-size", "1m", "bb"); r.code == 0 || !strings.Contains(r.err, "allow more with --max-size") {
		t.Errorf("a bound of 1 MB: %s", r)
	}
	if r := e.run("images", "sbom", "nosuch"); r.code == 0 || !strings.Contains(r.err, "No such image") {
		t.Errorf("no image: %s", r)
	}
}
