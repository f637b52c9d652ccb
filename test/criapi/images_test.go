package criapi

import (
	"io"
	"log"
	"net/http/httptest"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	gcr "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"google.golang.org/grpc/codes"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// serve runs a registry and gives its address.
func serve(t *testing.T) string {
	t.Helper()
	s := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

func push(t *testing.T, ref string, img gcr.Image) {
	t.Helper()
	r, err := name.ParseReference(ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(r, img); err != nil {
		t.Fatal(err)
	}
}

func randomImage(t *testing.T, user string) gcr.Image {
	t.Helper()
	img, err := random.Image(1024, 2)
	if err != nil {
		t.Fatal(err)
	}
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c = c.DeepCopy()
	c.Architecture, c.OS, c.Config.User, c.Config.Cmd = goarch(), "linux", user, []string{"/x"}
	if img, err = mutate.ConfigFile(img, c); err != nil {
		t.Fatal(err)
	}
	return img
}

func goarch() string {
	out, _ := exec.Command("go", "env", "GOARCH").Output()
	return strings.TrimSpace(string(out))
}

func (n *node) pull(t *testing.T, ref string) string {
	t.Helper()
	r, err := n.img.PullImage(ctx(t), &v1.PullImageRequest{Image: &v1.ImageSpec{Image: ref}})
	if err != nil {
		t.Fatalf("PullImage %s: %v", ref, err)
	}
	return r.ImageRef
}

func (n *node) imageStatus(t *testing.T, ref string) *v1.Image {
	t.Helper()
	r, err := n.img.ImageStatus(ctx(t), &v1.ImageStatusRequest{Image: &v1.ImageSpec{Image: ref}, Verbose: true})
	if err != nil {
		t.Fatalf("ImageStatus %s: %v", ref, err)
	}
	if (r.Image == nil) != (r.Info == nil) {
		t.Errorf("ImageStatus %s: %v", ref, r)
	}
	return r.Image
}

func (n *node) removeImage(t *testing.T, ref string) {
	t.Helper()
	if _, err := n.img.RemoveImage(ctx(t), &v1.RemoveImageRequest{Image: &v1.ImageSpec{Image: ref}}); err != nil {
		t.Fatalf("RemoveImage %s: %v", ref, err)
	}
}

func images(t *testing.T, n *node) {
	one, two := serve(t), serve(t)
	img := randomImage(t, "1234:5678")
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	push(t, one+"/team/app:v1", img)
	push(t, one+"/team/app:latest", img)
	push(t, two+"/mirror/app:v1", img)
	push(t, one+"/team/named:v1", randomImage(t, "worker"))

	id := n.pull(t, one+"/team/app:v1")
	if again := n.pull(t, one+"/team/app:v1"); again != id {
		t.Errorf("pulled again: %s, %s", id, again)
	}
	s := n.imageStatus(t, one+"/team/app:v1")
	if s == nil || s.Id != id || !slices.Equal(s.RepoTags, []string{one + "/team/app:v1"}) || len(s.RepoDigests) != 1 || s.Size == 0 || s.Uid.GetValue() != 1234 || s.Username != "" || s.Pinned {
		t.Errorf("%v", s)
	}
	for _, ref := range []string{id, strings.TrimPrefix(id, "sha256:"), s.RepoDigests[0], one + "/team/app@" + digest.String()} {
		if x := n.imageStatus(t, ref); x.GetId() != id {
			t.Errorf("by %s: %v", ref, x)
		}
	}
	// No tag is latest; two names, one image; two registries, one image.
	if x := n.pull(t, one+"/team/app"); x != id {
		t.Errorf("without a tag: %s", x)
	}
	if x := n.pull(t, two+"/mirror/app:v1"); x != id {
		t.Errorf("from another registry: %s", x)
	}
	if s := n.imageStatus(t, id); len(s.RepoTags) != 3 {
		t.Errorf("%v", s)
	}
	if x := n.pull(t, one+"/team/app@"+digest.String()); x != id {
		t.Errorf("by digest: %s", x)
	}
	named := n.pull(t, one+"/team/named:v1")
	if s := n.imageStatus(t, named); s.Username != "worker" || s.Uid != nil {
		t.Errorf("%v", s)
	}
	l, err := n.img.ListImages(ctx(t), &v1.ListImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	count := 0
	for _, x := range l.Images {
		if x.Id == id {
			count++
		}
		if slices.Contains(x.RepoTags, "docker.io/library/bb:latest") && !x.Pinned {
			t.Error("an image of a user is the kubelet's to remove")
		}
	}
	if count != 1 {
		t.Errorf("listed %d times", count)
	}
	l, err = n.img.ListImages(ctx(t), &v1.ListImagesRequest{Filter: &v1.ImageFilter{Image: &v1.ImageSpec{Image: one + "/team/app:v1"}}})
	if err != nil || len(l.Images) != 1 || l.Images[0].Id != id {
		t.Errorf("filtered: %v, %v", l, err)
	}
	// A user's prune leaves Kubernetes' images alone.
	n.must("image", "prune", "-af")
	if n.imageStatus(t, id) == nil {
		t.Fatal("a prune took Kubernetes' image")
	}
	n.importBusybox() // which was a user's
	// By name one name goes, by id all, at the same time.
	n.removeImage(t, two+"/mirror/app:v1")
	if s := n.imageStatus(t, id); len(s.GetRepoTags()) != 2 {
		t.Errorf("%v", s)
	}
	var wg sync.WaitGroup
	for range 5 {
		wg.Go(func() {
			n.removeImage(t, id)
			if s := n.imageStatus(t, id); s != nil {
				t.Errorf("after its removal: %v", s)
			}
		})
	}
	wg.Wait()
	n.removeImage(t, named)
	n.removeImage(t, named)
	for _, ref := range []string{one + "/team/app:v1", one + "/team/app@" + digest.String(), id} {
		if s := n.imageStatus(t, ref); s != nil {
			t.Errorf("%s: %v", ref, s)
		}
	}
	_, err = n.img.PullImage(ctx(t), &v1.PullImageRequest{Image: &v1.ImageSpec{Image: one + "/no/such:v1"}})
	wants(t, "pull of a missing image", err, codes.NotFound)
	_, err = n.img.PullImage(ctx(t), &v1.PullImageRequest{Image: &v1.ImageSpec{Image: "repo/UPPER"}})
	wants(t, "pull of a bad name", err, codes.InvalidArgument)
	_, err = n.img.PullImage(ctx(t), &v1.PullImageRequest{Image: &v1.ImageSpec{Image: one + "/team/app:v1"}, Auth: &v1.AuthConfig{Auth: "%%%"}})
	wants(t, "pull with bad credentials", err, codes.InvalidArgument)
}

func imageVolumes(t *testing.T, n *node) {
	p := podConfig(t)
	c := sleeper("a")
	c.Mounts = []*v1.Mount{
		{ContainerPath: "/mnt/image", Readonly: true, Image: &v1.ImageSpec{Image: "bb"}},
		{ContainerPath: "/mnt/etc", Readonly: true, Image: &v1.ImageSpec{Image: "bb"}, ImageSubPath: "etc"},
	}
	_, id := n.up(t, p, c)
	if out := n.exec(t, id, "ls", "-d", "/mnt/image/bin/sh", "/mnt/etc/passwd"); out != "/mnt/etc/passwd\n/mnt/image/bin/sh\n" && out != "/mnt/image/bin/sh\n/mnt/etc/passwd\n" {
		t.Errorf("%q", out)
	}
	n.exec(t, id, "/mnt/image/bin/ls", "/mnt/image")
	for _, f := range []string{"/mnt/image/x", "/mnt/etc/x"} {
		if r := n.try(t, id, "touch", f); r.ExitCode == 0 {
			t.Errorf("%s was written", f)
		}
	}
	img := n.imageStatus(t, "bb")
	for _, m := range n.status(t, id).Mounts {
		if m.Image.GetImageRef() != img.Id {
			t.Errorf("%v", m)
		}
	}
}
