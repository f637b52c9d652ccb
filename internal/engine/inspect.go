package engine

import (
	"context"
	"maps"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/storage"

	"github.com/cloudos-io/cloudos/internal/container"
)

// storageDriver is the name of the overlay store, as Docker's is called.
const storageDriver = "overlay2"

// ContainerInspect describes a container in Docker's shape.
func (e *Engine) ContainerInspect(ctx context.Context, name string, size bool) (mcontainer.InspectResponse, error) {
	u, err := e.lookup(name)
	if err != nil {
		return mcontainer.InspectResponse{}, err
	}
	r := u.rec.Load()
	execs := e.execsOf(u)
	f := e.filePaths(u, r)
	hc := *r.HostConfig
	hc.Links = e.shownLinks(r)
	cfg := *r.Config
	out := mcontainer.InspectResponse{
		ID: r.ID, Created: stamp(r.Created), Path: r.Path, Args: r.Args, State: inspectState(r.State), Image: r.Image.ID,
		ResolvConfPath: f.ResolvConf, HostnamePath: f.Hostname, HostsPath: f.Hosts, LogPath: u.log, Name: "/" + r.Name,
		RestartCount: r.RestartCount, Driver: storageDriver, Platform: "linux", AppArmorProfile: e.cfg.AppArmorProfile,
		ExecIDs: execs, HostConfig: &hc, Config: &cfg, Mounts: mountPoints(r),
		NetworkSettings: &mcontainer.NetworkSettings{Ports: inspectPorts(r), Networks: endpointsOf(r)},
	}
	if hc.Runtime == "" {
		hc.Runtime = nativeRuntime
		if e.cfg.DefaultRuntime != "" {
			hc.Runtime = e.cfg.DefaultRuntime
		}
		out.HostConfig.Runtime = hc.Runtime
	}
	if t := hc.LogConfig.Type; t != "json-file" && t != "k8s-file" && t != "local" {
		out.LogPath = ""
	}
	if out.Args == nil {
		out.Args = []string{}
	}
	if r.State.Running() {
		out.NetworkSettings.SandboxID = r.ID
		if t := u.running(); t != nil {
			out.ProcessLabel = e.labelOf(t)
			out.NetworkSettings.SandboxKey = "/proc/" + itoa(t.Pid()) + "/ns/net"
		}
	}
	if r.Image.Manifest.Digest != "" {
		out.ImageManifestDescriptor = manifestOf(r)
	}
	if lower, upper, work, merged, err := e.cfg.Snapshots.Dirs(r.ID); err == nil {
		data := map[string]string{"UpperDir": upper, "WorkDir": work, "MergedDir": merged}
		for i, l := range lower {
			if i > 0 {
				data["LowerDir"] += ":"
			}
			data["LowerDir"] += l
		}
		out.GraphDriver = &storage.DriverData{Name: storageDriver, Data: data}
	}
	if size {
		rw, root := e.sizes(ctx, r)
		out.SizeRw, out.SizeRootFs = &rw, &root
	}
	return out, nil
}

// sizes are the bytes of the writable layer, and with those of the image.
func (e *Engine) sizes(ctx context.Context, r *container.Record) (rw, root int64) {
	rw, err := e.cfg.Snapshots.Usage(ctx, r.ID)
	if err != nil {
		rw = 0
	}
	root = rw
	if r.Image.ID != "" {
		if img, err := e.cfg.Images.Resolve(ctx, r.Image.ID, ""); err == nil {
			root += img.Size
		}
	}
	return rw, root
}

// stamp formats a time as the API does; never is the zero time.
func stamp(t time.Time) string {
	if t.IsZero() {
		return "0001-01-01T00:00:00Z"
	}
	return t.UTC().Format(time.RFC3339Nano)
}

func inspectState(s container.State) *mcontainer.State {
	out := &mcontainer.State{
		Status: s.Status, Running: s.Running() || s.Status == mcontainer.StateRestarting, Paused: s.Status == mcontainer.StatePaused,
		Restarting: s.Status == mcontainer.StateRestarting, OOMKilled: s.OOMKilled, Dead: s.Status == mcontainer.StateDead,
		Pid: s.Pid, ExitCode: s.ExitCode, Error: s.Error, StartedAt: stamp(s.StartedAt), FinishedAt: stamp(s.FinishedAt),
	}
	if s.Health != nil {
		h := *s.Health
		if h.Log == nil {
			h.Log = []*mcontainer.HealthcheckResult{}
		}
		out.Health = &h
	}
	return out
}

// sharedEndpoints is endpointsOf without a copy, for who only shows them: what a
// published record holds is not changed.
func sharedEndpoints(r *container.Record) map[string]*network.EndpointSettings {
	if len(r.Attached) > 0 {
		return r.Attached
	}
	if r.Endpoints == nil {
		return map[string]*network.EndpointSettings{}
	}
	return r.Endpoints
}

// endpointsOf are the networks of a container: in use while it runs, else as asked.
func endpointsOf(r *container.Record) map[string]*network.EndpointSettings {
	eps := r.Attached
	if len(eps) == 0 {
		eps = r.Endpoints
	}
	out := make(map[string]*network.EndpointSettings, len(eps))
	for k, v := range eps {
		out[k] = v.Copy()
	}
	return out
}

func inspectPorts(r *container.Record) network.PortMap {
	m := network.PortMap{}
	if !r.State.Running() {
		return m
	}
	for p := range r.Config.ExposedPorts {
		m[p] = nil
	}
	maps.Copy(m, r.Ports)
	return m
}
