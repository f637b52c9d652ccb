package dockerapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	mimage "github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/api/types/system"
	"github.com/moby/moby/api/types/volume"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/engine"
	"github.com/cloudos-io/cloudos/internal/image"
)

// fake is a backend that records calls and answers what a test gave it. It is
// for decoding and encoding alone; nothing about containers is tested with it.
type fake struct {
	mu     sync.Mutex
	calls  []string
	err    error // what every method returns
	mayNot error // what a policy says to what is the host's

	terminal bool
	attached func() Attached
	inspect  container.InspectResponse
	wait     chan container.WaitResponse
	late     error // returned after something was emitted
	events   []events.Message
	usage    system.DiskUsage
	imgInsp  mimage.InspectResponse
}

func (f *fake) call(format string, args ...any) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, fmt.Sprintf(format, args...))
	return f.err
}

func (f *fake) last() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.calls) == 0 {
		return ""
	}
	return f.calls[len(f.calls)-1]
}

// js shows a decoded request.
func js(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

func num(n *int) string {
	if n == nil {
		return "-"
	}
	return fmt.Sprint(*n)
}

func (f *fake) ContainerCreate(_ context.Context, req CreateRequest) (container.CreateResponse, error) {
	return container.CreateResponse{ID: "c0ffee"}, f.call("create %s", js(req))
}
func (f *fake) ContainerStart(_ context.Context, name string, o StartOptions) error {
	return f.call("start %s keys=%q", name, o.DetachKeys)
}
func (f *fake) ContainerRun(_ context.Context, req CreateRequest, at AttachRequest) (RunningContainer, error) {
	err := f.call("run %s %s", js(req), js(at))
	if err != nil {
		return RunningContainer{}, err
	}
	return RunningContainer{ID: "c0ffee", Warnings: []string{"careful"}, Streams: f.attached(), Wait: f.wait}, nil
}
func (f *fake) ContainerExec(_ context.Context, name string, req container.ExecCreateRequest) (RunningContainer, error) {
	if err := f.call("exec %s %s", name, js(req)); err != nil {
		return RunningContainer{ID: "e4ec"}, err
	}
	return RunningContainer{ID: "e4ec", Streams: f.attached(), Wait: f.wait}, nil
}
func (f *fake) ContainerStop(_ context.Context, name, signal string, t *int) error {
	return f.call("stop %s signal=%s t=%s", name, signal, num(t))
}
func (f *fake) ContainerRestart(_ context.Context, name, signal string, t *int) error {
	return f.call("restart %s signal=%s t=%s", name, signal, num(t))
}
func (f *fake) ContainerKill(_ context.Context, name, signal string) error {
	return f.call("kill %s signal=%s", name, signal)
}
func (f *fake) ContainerPause(_ context.Context, name string) error { return f.call("pause %s", name) }
func (f *fake) ContainerUnpause(_ context.Context, name string) error {
	return f.call("unpause %s", name)
}
func (f *fake) ContainerRename(_ context.Context, name, n string) error {
	return f.call("rename %s %s", name, n)
}
func (f *fake) ContainerUpdate(_ context.Context, name string, u container.UpdateConfig) (container.UpdateResponse, error) {
	return container.UpdateResponse{}, f.call("update %s memory=%d pids=%v weight=%d", name, u.Memory, u.PidsLimit != nil, len(u.BlkioWeightDevice))
}
func (f *fake) ContainerWait(_ context.Context, name string, c container.WaitCondition) (<-chan container.WaitResponse, error) {
	err := f.call("wait %s %s", name, c)
	if err != nil {
		return nil, err
	}
	if f.wait != nil {
		return f.wait, nil
	}
	ch := make(chan container.WaitResponse, 1)
	ch <- container.WaitResponse{StatusCode: 7}
	return ch, nil
}
func (f *fake) ContainerRemove(_ context.Context, name string, force, v, link bool) error {
	return f.call("remove %s force=%t v=%t link=%t", name, force, v, link)
}
func (f *fake) ContainerList(_ context.Context, o ListOptions) ([]container.Summary, error) {
	s := container.Summary{ID: "c0ffee", Health: &container.HealthSummary{}, ImageManifestDescriptor: &ocispec.Descriptor{}}
	s.HostConfig.Annotations = map[string]string{"a": "b"}
	return []container.Summary{s}, f.call("list %s", js(o))
}
func (f *fake) ContainerInspect(_ context.Context, name string, size bool) (container.InspectResponse, error) {
	return f.inspect, f.call("inspect %s size=%t", name, size)
}
func (f *fake) ContainerTop(_ context.Context, name, args string) (container.TopResponse, error) {
	return container.TopResponse{Titles: []string{"PID"}}, f.call("top %s %q", name, args)
}
func (f *fake) ContainerStats(_ context.Context, name string, stream, one bool, emit func(*container.StatsResponse) error) error {
	if err := f.call("stats %s stream=%t one-shot=%t", name, stream, one); err != nil {
		return err
	}
	return errors.Join(emit(&container.StatsResponse{ID: "c0ffee", OSType: "linux"}), f.late)
}
func (f *fake) ContainerChanges(_ context.Context, name string) ([]container.FilesystemChange, error) {
	return []container.FilesystemChange{{Kind: container.ChangeAdd, Path: "/x"}}, f.call("changes %s", name)
}
func (f *fake) ContainerExport(_ context.Context, name string, w io.Writer) error {
	if err := f.call("export %s", name); err != nil {
		return err
	}
	_, err := io.WriteString(w, "tar")
	return errors.Join(err, f.late)
}
func (f *fake) ContainerCommit(_ context.Context, o CommitOptions) (string, error) {
	return "sha256:abc", f.call("commit %s", js(o))
}
func (f *fake) ContainerPrune(_ context.Context, fl Filters) (container.PruneReport, error) {
	return container.PruneReport{}, f.call("prune containers %s", js(fl))
}
func (f *fake) ContainerResize(_ context.Context, name string, w, h uint16) error {
	return f.call("resize %s %dx%d", name, w, h)
}
func (f *fake) ContainerAttach(_ context.Context, name string, req AttachRequest) (Attached, error) {
	err := f.call("attach %s %s", name, js(req))
	if err != nil {
		return Attached{}, err
	}
	return f.attached(), nil
}
func (f *fake) ContainerLogs(_ context.Context, name string, o LogOptions, emit func(LogRecord) error) error {
	if err := f.call("logs %s %s", name, js(o)); err != nil {
		return err
	}
	at := time.Date(2024, 5, 6, 7, 8, 9, 10, time.UTC)
	for _, r := range []LogRecord{
		{Time: at, Stream: "stdout", Line: []byte("out\n"), Attrs: map[string]string{"k": "v w"}},
		{Time: at, Stream: "stderr", Line: []byte("err\n")},
	} {
		if err := emit(r); err != nil {
			return err
		}
	}
	return f.late
}
func (f *fake) IsTerminal(context.Context, string) (bool, error) { return f.terminal, f.err }
func (f *fake) ContainerStatPath(_ context.Context, name, p string) (container.PathStat, error) {
	return container.PathStat{Name: "x", Size: 3}, f.call("stat %s %s", name, p)
}
func (f *fake) ContainerGetArchive(_ context.Context, name, p string, w func(container.PathStat) (io.Writer, error)) error {
	if err := f.call("archive %s %s", name, p); err != nil {
		return err
	}
	out, err := w(container.PathStat{Name: "x", Size: 3})
	if err != nil {
		return err
	}
	_, err = io.WriteString(out, "tar")
	return err
}
func (f *fake) ContainerPutArchive(_ context.Context, name, p string, noDir, chown bool, r io.Reader) error {
	b, _ := io.ReadAll(r)
	return f.call("extract %s %s noOverwriteDirNonDir=%t copyUIDGID=%t %q", name, p, noDir, chown, b)
}
func (f *fake) ExecCreate(_ context.Context, name string, req container.ExecCreateRequest) (string, error) {
	return "e0", f.call("exec create %s %s", name, js(req))
}
func (f *fake) ExecStart(_ context.Context, id string, req container.ExecStartRequest) (Attached, error) {
	err := f.call("exec start %s %s", id, js(req))
	if err != nil || req.Detach {
		return Attached{}, err
	}
	return f.attached(), nil
}
func (f *fake) ExecInspect(_ context.Context, id string) (container.ExecInspectResponse, error) {
	return container.ExecInspectResponse{ID: id}, f.call("exec inspect %s", id)
}
func (f *fake) ExecResize(_ context.Context, id string, w, h uint16) error {
	return f.call("exec resize %s %dx%d", id, w, h)
}

func (f *fake) VolumeCreate(_ context.Context, req volume.CreateRequest) (*volume.Volume, error) {
	return &volume.Volume{Name: req.Name}, f.call("volume create %s", js(req))
}
func (f *fake) VolumeList(_ context.Context, fl Filters) (volume.ListResponse, error) {
	return volume.ListResponse{}, f.call("volume list %s", js(fl))
}
func (f *fake) VolumeInspect(_ context.Context, name string) (*volume.Volume, error) {
	return &volume.Volume{Name: name}, f.call("volume inspect %s", name)
}
func (f *fake) VolumeRemove(_ context.Context, name string, force bool) error {
	return f.call("volume remove %s force=%t", name, force)
}
func (f *fake) VolumePrune(_ context.Context, fl Filters) (volume.PruneReport, error) {
	return volume.PruneReport{}, f.call("volume prune %s", js(fl))
}

func (f *fake) NetworkCreate(_ context.Context, req network.CreateRequest) (network.CreateResponse, error) {
	return network.CreateResponse{ID: "n0"}, f.call("network create %s", js(req))
}
func (f *fake) NetworkList(_ context.Context, fl Filters) ([]network.Summary, error) {
	return []network.Summary{{Network: network.Network{ID: "n0", Name: "net"}}}, f.call("network list %s", js(fl))
}
func (f *fake) NetworkInspect(_ context.Context, name string) (network.Inspect, error) {
	return network.Inspect{Network: network.Network{ID: "n0", Name: name}, Status: &network.Status{}}, f.call("network inspect %s", name)
}
func (f *fake) NetworkRemove(_ context.Context, name string) error {
	return f.call("network remove %s", name)
}
func (f *fake) NetworkConnect(_ context.Context, name string, req network.ConnectRequest) error {
	return f.call("network connect %s %s", name, js(req))
}
func (f *fake) NetworkDisconnect(_ context.Context, name string, req network.DisconnectRequest) error {
	return f.call("network disconnect %s %s", name, js(req))
}
func (f *fake) NetworkPrune(_ context.Context, fl Filters) (network.PruneReport, error) {
	return network.PruneReport{}, f.call("network prune %s", js(fl))
}

func (f *fake) Info(context.Context) (*system.Info, error) {
	return &system.Info{
		ID: "i0", RegistryConfig: &registry.ServiceConfig{}, Containerd: &system.ContainerdInfo{}, NRI: &system.NRIInfo{},
		FirewallBackend: &system.FirewallInfo{}, RuncCommit: system.Commit{ID: "r1"},
		Runtimes: map[string]system.RuntimeWithStatus{"native": {Status: map[string]string{"a": "b"}}},
	}, f.call("info")
}
func (f *fake) Version(context.Context) (system.VersionResponse, error) {
	return system.VersionResponse{Version: "9"}, f.call("version")
}
func (f *fake) DiskUsage(_ context.Context, types []string, verbose bool) (system.DiskUsage, error) {
	return f.usage, f.call("df %v verbose=%t", types, verbose)
}
func (f *fake) Events(_ context.Context, since, until time.Time, fl Filters, emit func(events.Message) error) error {
	unix := func(t time.Time) int64 {
		if t.IsZero() {
			return 0
		}
		return t.UnixNano()
	}
	if err := f.call("events %d %d %s", unix(since), unix(until), js(fl)); err != nil {
		return err
	}
	for _, m := range f.events {
		if err := emit(m); err != nil {
			return err
		}
	}
	return f.late
}
func (f *fake) Doctor(context.Context) ([]api.Finding, error) { return nil, f.call("doctor") }

func (f *fake) Fix(_ context.Context, o api.FixRequest) (api.FixReport, error) {
	return api.FixReport{}, f.call("fix %v", o.Actions)
}
func (f *fake) Prune(_ context.Context, o api.PruneRequest) (api.PruneReport, error) {
	return api.PruneReport{}, f.call("prune %s", js(o))
}
func (f *fake) Shutdown(_ context.Context, containers bool) error {
	return f.call("shutdown containers=%t", containers)
}
func (f *fake) ImageInUse(string) map[string]bool  { return map[string]bool{"c0ffee": true} }
func (f *fake) MayActAsHost(context.Context) error { return f.mayNot }
func (f *fake) PoolDrained(_ context.Context, full bool) error {
	return f.call("drained full=%t", full)
}
func (f *fake) Metrics(_ context.Context, w io.Writer) error {
	_, err := io.WriteString(w, "servin_up 1\n")
	return errors.Join(err, f.call("metrics"))
}

// fakeImages is apart because its method names collide.
type fakeImages struct{ *fake }

func (f fakeImages) Pull(_ context.Context, o image.PullOptions) error {
	if err := f.call("pull %s platform=%s all=%t auth=%s", o.Ref, o.Platform, o.AllTags, js(o.Auth)); err != nil {
		return err
	}
	o.Progress(image.Progress{ID: "latest", Action: "Pulling from library/busybox"})
	o.Progress(image.Progress{ID: "abc", Action: "Downloading", Current: 50, Total: 100})
	return f.late
}
func (f fakeImages) Push(_ context.Context, o image.PushOptions) error {
	if err := f.call("push %s platform=%s all=%t auth=%s", o.Ref, o.Platform, o.AllTags, js(o.Auth)); err != nil {
		return err
	}
	o.Progress(image.Progress{ID: "abc", Action: "Pushed"})
	return f.late
}
func (f fakeImages) List(_ context.Context, fl map[string]map[string]bool, all, shared, manifests bool) ([]mimage.Summary, error) {
	return []mimage.Summary{{ID: "sha256:abc", Size: 5, Containers: -1, Descriptor: &ocispec.Descriptor{}}},
		f.call("images %s all=%t shared=%t manifests=%t", js(fl), all, shared, manifests)
}
func (f fakeImages) Inspect(_ context.Context, ref, platform string, manifests bool) (mimage.InspectResponse, error) {
	return f.imgInsp, f.call("image inspect %s platform=%s manifests=%t", ref, platform, manifests)
}
func (f fakeImages) History(_ context.Context, ref, platform string) ([]mimage.HistoryResponseItem, error) {
	return nil, f.call("history %s platform=%s", ref, platform)
}
func (f fakeImages) Tag(_ context.Context, ref, target string) error {
	return f.call("tag %s %s", ref, target)
}
func (f fakeImages) Remove(_ context.Context, ref string, o image.RemoveOptions) ([]mimage.DeleteResponse, error) {
	return nil, f.call("image remove %s force=%t noprune=%t inuse=%d", ref, o.Force, o.NoPrune, len(o.InUse("sha256:abc")))
}
func (f fakeImages) Prune(_ context.Context, fl map[string]map[string]bool, inUse func(digest.Digest) map[string]bool) (mimage.PruneReport, error) {
	return mimage.PruneReport{}, f.call("image prune %s inuse=%d", js(fl), len(inUse("sha256:abc")))
}
func (f fakeImages) Save(_ context.Context, refs []string, ps []ocispec.Platform, w io.Writer) error {
	if err := f.call("save %v %s", refs, js(ps)); err != nil {
		return err
	}
	_, err := io.WriteString(w, "tar")
	return errors.Join(err, f.late)
}
func (f fakeImages) Load(_ context.Context, r io.Reader, ps []ocispec.Platform, progress func(image.Progress)) ([]string, error) {
	b, _ := io.ReadAll(r)
	if err := f.call("load %q %s quiet=%t", b, js(ps), progress == nil); err != nil {
		return nil, err
	}
	if progress != nil {
		progress(image.Progress{ID: "abc", Action: "Loading layer", Current: 1, Total: 2})
	}
	return []string{"busybox:latest", "sha256:abc"}, f.late
}
func (f fakeImages) Import(_ context.Context, r io.Reader, ref, msg, platform string, changes []string) (digest.Digest, error) {
	b, _ := io.ReadAll(r)
	return "sha256:abc", f.call("import %q %s %q platform=%s %v", b, ref, msg, platform, changes)
}
func (f fakeImages) Distribution(_ context.Context, ref string, a *registry.AuthConfig) (registry.DistributionInspect, error) {
	return registry.DistributionInspect{}, f.call("distribution %s auth=%s", ref, js(a))
}
func (f fakeImages) Login(_ context.Context, a registry.AuthConfig) (registry.AuthResponse, error) {
	return registry.AuthResponse{}, f.call("login %s", a.Username)
}

func handlerOf(f *fake) http.Handler {
	return New(Config{
		Containers: f, Images: fakeImages{f}, Networks: f, Volumes: f, VolumeCopies: f, Checkpoints: f, Secrets: f, Policy: f, System: f, Version: "test",
		Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
		OS: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			b, _ := io.ReadAll(r.Body)
			fmt.Fprintf(w, "passed %s %s %s", r.Method, r.URL.RequestURI(), b)
		}),
	})
}

// serveFake serves the fake on a unix socket and returns the socket's path and
// a client.
func serveFake(t *testing.T, f *fake) (string, *http.Client) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := Listen("unix://"+path, ListenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, []net.Listener{l}, handlerOf(f)) }()
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}}
	t.Cleanup(func() {
		tr.CloseIdleConnections()
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Error("Serve does not end")
		}
	})
	return path, &http.Client{Transport: tr}
}

func trim(b []byte) string { return strings.TrimSpace(string(b)) }

func (f *fake) CheckpointCreate(_ context.Context, name string, o api.CheckpointCreate) error {
	return f.call("checkpoint %s %s", name, js(o))
}

func (f *fake) CheckpointList(name, dir string) ([]api.Checkpoint, error) {
	return nil, f.call("checkpoints %s %q", name, dir)
}

func (f *fake) CheckpointRemove(_ context.Context, name, id, dir string) error {
	return f.call("checkpoint remove %s %s %q", name, id, dir)
}

func (f *fake) CheckpointRestore(_ context.Context, name string, o api.RestoreOptions) (api.Restored, error) {
	return api.Restored{ID: "r"}, f.call("restore %s %s", name, js(o))
}

func (f *fake) CheckpointImport(_ context.Context, o api.RestoreOptions, r io.Reader) (api.Restored, error) {
	b, _ := io.ReadAll(r)
	return api.Restored{ID: "i"}, f.call("import checkpoint %s %s", js(o), b)
}

func (f *fake) CheckpointStream(ctx context.Context, name string, o api.CheckpointStart, s engine.CheckpointSink) (err error) {
	if err := f.call("checkpoint stream %s %s", name, js(o)); err != nil {
		return err
	}
	defer func() { _ = f.call("confirmed %v", err == nil) }()
	if err := s.Tell(api.CheckpointEvent{Stage: "files"}); err != nil {
		return err
	}
	if _, err := io.WriteString(s, "tar"); err != nil {
		return err
	}
	if err := s.Tell(api.CheckpointEvent{Ready: true}); err != nil {
		return err
	}
	if err := s.Confirm(ctx); err != nil {
		return err
	}
	return s.Tell(api.CheckpointEvent{Done: true})
}
