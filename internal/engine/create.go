package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/caller"
	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/image"
	"github.com/cloudos-io/cloudos/internal/oci"
	"github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/snapshot"
)

// ContainerCreate makes a container. When it returns, the record is on disk.
func (e *Engine) ContainerCreate(ctx context.Context, req CreateRequest) (mcontainer.CreateResponse, error) {
	u, warnings, err := e.create(ctx, req)
	if err != nil {
		return mcontainer.CreateResponse{}, err
	}
	_, p, err := e.change(u, func(*container.Record) {})
	if err == nil {
		err = p.Wait()
	}
	if err != nil {
		e.discard(context.WithoutCancel(ctx), u)
		return mcontainer.CreateResponse{}, fmt.Errorf("cannot create container: %w", err)
	}
	e.publish(u, events.ActionCreate, nil)
	return mcontainer.CreateResponse{ID: u.id, Warnings: warnings}, nil
}

// undo holds what to take back when a use case fails midway.
type undo []func(ctx context.Context)

func (u *undo) add(fn func(ctx context.Context)) { *u = append(*u, fn) }

// run takes everything back, the latest first.
func (u undo) run(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	for i := len(u) - 1; i >= 0; i-- {
		u[i](ctx)
	}
}

// scope is an undo with descriptors that are needed until the use case ends,
// however it does.
type scope struct {
	undo
	files []*os.File
}

func (s *scope) hold(f *os.File) { s.files = append(s.files, f) }

func (s *scope) close() {
	for _, f := range s.files {
		f.Close()
	}
}

// create makes everything of a container but its stored record.
func (e *Engine) create(ctx context.Context, req CreateRequest) (u *unit, warnings []string, err error) {
	ctx, end := e.span(ctx, "container.create")
	defer end(&err)
	if e.closed.Load() || e.noRestarts.Load() {
		return nil, nil, fault.New(fault.Unavailable, "cannot create container: the engine is shutting down")
	}
	cfg, hc := req.Config, req.HostConfig
	if hc == nil {
		hc = &mcontainer.HostConfig{}
	}
	if req.Extra.Debug != "" {
		if err := e.debugging(ctx, &req, hc); err != nil {
			return nil, nil, err
		}
	}
	asked := hc
	if req.member != nil { // Kubernetes' limits may be smaller than Docker's least ones
		c := *hc
		c.Resources = mcontainer.Resources{CgroupParent: hc.CgroupParent}
		c.NetworkMode = network.NetworkNone // a pod's, which goes with a name of its own
		asked = &c
	}
	if warnings, err = oci.Validate(cfg, asked, e.cfg.Host); err != nil {
		return nil, nil, err
	}
	name := ""
	if req.Name != "" {
		if name, err = container.CheckName(req.Name); err != nil {
			return nil, nil, err
		}
	}
	if _, err := e.driver(hc.Runtime); err != nil {
		return nil, nil, err
	}
	if err := e.checkLogConfig(&hc.LogConfig); err != nil {
		return nil, nil, err
	}

	var img image.Resolved
	if cfg.Image != "" {
		if img, err = e.cfg.Images.Resolve(ctx, cfg.Image, req.Platform); err != nil {
			return nil, nil, err
		}
	}
	// Before the image's labels come in: it is not for an image to ask for these.
	readLabels(&req.Extra, cfg.Labels)
	if err := oci.Merge(cfg, img); err != nil {
		return nil, nil, err
	}
	swap := hc.MemorySwap
	oci.ApplyDefaults(hc, e.cfg.Host, e.cfg.Defaults)
	if req.member != nil {
		hc.MemorySwap = swap // the kubelet says what there is of it
	}
	if hc.OomKillDisable == nil && !e.cfg.CgroupV2 {
		hc.OomKillDisable = new(bool) // unset means that there is no such switch
	}
	if hc.UsernsMode == "auto" || req.Extra.UsernsAuto {
		hc.UsernsMode, req.Extra.UsernsAuto = "auto", true
	}
	size, err := oci.StorageSize(hc.StorageOpt)
	if err != nil {
		return nil, nil, err
	}
	endpoints, err := e.endpoints(hc, req.Networking)
	if err != nil {
		return nil, nil, err
	}
	if e.policed() {
		judged := hc
		if req.member != nil {
			judged = e.memberModes(hc, req.member)
		}
		if err := e.mayCreate(ctx, cfg, judged, img, endpoints); err != nil {
			return nil, nil, err
		}
	}

	var back undo
	defer func() {
		if err != nil {
			back.run(ctx)
		}
	}()

	key := e.sandboxKey(cfg, hc)
	id := e.cfg.Driver.Reserve(key)
	back.add(func(context.Context) { e.cfg.Driver.Release(id) })
	if name, err = e.reserveName(name, id); err != nil {
		return nil, nil, err
	}
	back.add(func(context.Context) { e.names.Release(name, id) })

	r := &container.Record{
		Version: container.RecordVersion, ID: id, Name: name, Created: time.Now().UTC(),
		Config: cfg, HostConfig: hc, Extra: req.Extra, Endpoints: endpoints,
		Image:     container.Image{ID: img.ID.String(), Ref: cfg.Image, Manifest: img.Manifest, Platform: img.Platform},
		Ephemeral: hc.AutoRemove, SizeLimit: size, Pod: req.member, Creator: caller.From(ctx),
		State: container.State{Status: mcontainer.StateCreated},
	}
	argv, err := oci.Args(cfg)
	if err != nil {
		return nil, nil, err
	}
	r.Path, r.Args = argv[0], argv[1:]
	if err := e.hostname(r); err != nil {
		return nil, nil, err
	}
	if err := e.pinShared(hc); err != nil {
		return nil, nil, err
	}
	if err := e.checkLinks(r); err != nil {
		return nil, nil, err
	}
	if _, ok := container.NewHealthCheck(cfg.Healthcheck); ok {
		r.State.Health = &mcontainer.Health{Status: mcontainer.Starting, Log: []*mcontainer.HealthcheckResult{}}
	}
	if err := e.userNS(ctx, r, &back); err != nil {
		return nil, nil, err
	}

	ofContainer(ctx, r)
	made := e.newUnit(r)
	if err := e.cfg.Snapshots.Create(ctx, id, img.Chain, r.Ephemeral, size); err != nil {
		return nil, nil, fmt.Errorf("cannot create the container's layer: %w", err)
	}
	back.add(func(ctx context.Context) { _ = e.cfg.Snapshots.Remove(ctx, id) })
	if err := os.Mkdir(made.dir, 0o711); err != nil {
		return nil, nil, fmt.Errorf("cannot make the container's directory: %w", err)
	}
	back.add(func(context.Context) { _ = os.RemoveAll(made.dir) })
	if err := e.createSecrets(r); err != nil {
		return nil, nil, err
	}
	w, err := e.createMounts(ctx, r, img.Chain, &back)
	if err != nil {
		return nil, nil, err
	}
	warnings = append(warnings, w...)
	if r.Pod != nil {
		memberMounts(r, &req)
	}

	e.mu.Lock()
	e.units[id] = made
	e.mu.Unlock()
	return made, warnings, nil
}

// pinShared turns names of containers whose namespaces are joined into ids: names
// may be taken over by others.
func (e *Engine) pinShared(hc *mcontainer.HostConfig) error {
	if m := hc.PidMode; m.IsContainer() {
		o, err := e.other(m.Container())
		if err != nil {
			return err
		}
		hc.PidMode = mcontainer.PidMode("container:" + o.id)
	}
	if m := hc.IpcMode; m.IsContainer() {
		o, err := e.other(m.Container())
		if err != nil {
			return err
		}
		hc.IpcMode = mcontainer.IpcMode("container:" + o.id)
	}
	return nil
}

// discard removes a unit whose creation was not acknowledged.
func (e *Engine) discard(ctx context.Context, u *unit) {
	if err := e.remove(ctx, u, true); err != nil {
		e.log.Warn("cannot remove a container that could not be created", "container", u.id, "cause", err)
	}
}

// reserveName takes the name asked for, or a random one.
func (e *Engine) reserveName(name, id string) (string, error) {
	if name != "" {
		return name, e.names.Reserve(name, id)
	}
	var err error
	for i := range 100 {
		if name = container.RandomName(i); name == "" {
			continue
		}
		if err = e.names.Reserve(name, id); err == nil {
			return name, nil
		}
	}
	return "", err
}

func readLabels(x *api.CreateExtra, labels map[string]string) {
	set := func(to *bool, label string) {
		if v, err := strconv.ParseBool(labels[label]); err == nil && v {
			*to = true
		}
	}
	set(&x.RestartUnhealthy, api.LabelRestartUnhealthy)
	set(&x.PublishThrough, api.LabelPublishThrough)
}

// hostname gives the container its name: that of the host, of the container
// whose network it shares, or the beginning of its id.
func (e *Engine) hostname(r *container.Record) error {
	hc := r.HostConfig
	if hc.NetworkMode.IsContainer() && r.Pod == nil {
		o, err := e.lookup(hc.NetworkMode.ConnectedContainer())
		if hc.NetworkMode.ConnectedContainer() == r.Name {
			return fault.New(fault.Invalid, "cannot join own network namespace")
		}
		if fault.Is(err, fault.NotFound) {
			// It may come; the start asks again.
			if r.Config.Hostname == "" {
				r.Config.Hostname = short(r.ID)
			}
			return nil
		}
		if err != nil {
			return err
		}
		if o.id == r.ID {
			return fault.New(fault.Invalid, "cannot join own network namespace")
		}
		oc := o.rec.Load().Config
		// Names may be taken over by others: the id is what is meant.
		hc.NetworkMode = mcontainer.NetworkMode("container:" + o.id)
		r.Config.Hostname, r.Config.Domainname = oc.Hostname, oc.Domainname
		return nil
	}
	if r.Pod != nil {
		_, p, err := e.podOf(r)
		if err != nil {
			return err
		}
		r.Config.Hostname = p.Hostname
	}
	if r.Config.Hostname != "" {
		return nil
	}
	if hc.UTSMode.IsHost() || hc.NetworkMode.IsHost() || r.Pod != nil { // such a pod has the host's
		h, err := os.Hostname()
		if err != nil {
			return fmt.Errorf("cannot read the host's name: %w", err)
		}
		r.Config.Hostname = h
		return nil
	}
	r.Config.Hostname = short(r.ID)
	return nil
}

// userNS allots a range of host ids, or takes that of the container whose
// namespaces are joined.
func (e *Engine) userNS(ctx context.Context, r *container.Record, back *undo) error {
	if r.Pod != nil {
		_, p, err := e.podOf(r)
		if err == nil {
			r.UserNS = p.UserNS
		}
		return err
	}
	for _, mode := range []string{string(r.HostConfig.NetworkMode), string(r.HostConfig.IpcMode), string(r.HostConfig.PidMode)} {
		name, ok := strings.CutPrefix(mode, "container:")
		if !ok {
			continue
		}
		o, err := e.other(name)
		if err != nil && mode == string(r.HostConfig.NetworkMode) && fault.Is(err, fault.Invalid) {
			continue // see hostname
		}
		if err != nil {
			return err
		}
		if ns := o.rec.Load().UserNS; ns.Size != 0 {
			r.UserNS = ns
		}
	}
	if r.HostConfig.UsernsMode != "auto" || r.UserNS.Size != 0 {
		return nil
	}
	if e.cfg.IDMaps == nil {
		return fault.New(fault.Unsupported, "cannot give the container its own user namespace: this engine has no id ranges; add them to /etc/subuid and /etc/subgid")
	}
	m, err := e.cfg.IDMaps.Allocate(ctx, r.ID, r.HostConfig.AutoRemove)
	if err != nil {
		return err
	}
	back.add(func(context.Context) { _ = e.cfg.IDMaps.Release(r.ID) })
	if len(m.UIDs) != 1 || m.UIDs[0].Container != 0 {
		return errors.New("cannot use the id range: it has holes")
	}
	r.UserNS = container.UserNS{Host: m.UIDs[0].Host, Size: m.UIDs[0].Size}
	return nil
}

// other finds a container that a request to create another one names. "Not found"
// would be taken for the image: clients then pull it and try again.
func (e *Engine) other(name string) (*unit, error) {
	u, err := e.lookup(name)
	if fault.Is(err, fault.NotFound) {
		return nil, fault.New(fault.Invalid, "%v", err)
	}
	return u, err
}

// idMap is the mapping of a container, zero for the host's ids.
func idMap(r *container.Record) snapshot.IDMap {
	if r.UserNS.Size == 0 {
		return snapshot.IDMap{}
	}
	m := []snapshot.IDRange{{Host: r.UserNS.Host, Size: r.UserNS.Size}}
	return snapshot.IDMap{UIDs: m, GIDs: m}
}

// sandboxKey tells which parked sandboxes fit.
func (e *Engine) sandboxKey(cfg *mcontainer.Config, hc *mcontainer.HostConfig) runtime.SandboxKey {
	k := runtime.SandboxKey{CgroupParent: hc.CgroupParent}
	if hc.UsernsMode == "auto" {
		k.UserNS = "auto"
	}
	special := hc.PidMode != "" || hc.UTSMode != "" || hc.IpcMode.IsHost() || hc.IpcMode.IsContainer() || hc.CgroupnsMode.IsHost() ||
		!e.native(hc.Runtime)
	switch {
	case special:
	case hc.NetworkMode.IsNone(), cfg.NetworkDisabled:
		k.Network = "none"
	case hc.NetworkMode.IsDefault(), hc.NetworkMode.IsBridge():
		k.Network = "bridge"
	}
	return k
}

// endpoints are the networks to attach to, by name, with what was asked of each.
func (e *Engine) endpoints(hc *mcontainer.HostConfig, n *network.NetworkingConfig) (map[string]*network.EndpointSettings, error) {
	mode := hc.NetworkMode
	if mode.IsContainer() {
		if n != nil && len(n.EndpointsConfig) > 0 {
			return nil, fault.New(fault.Invalid, "conflicting options: cannot attach both user-defined and non-user-defined network-modes")
		}
		return nil, nil
	}
	name := networkName(mode)
	eps := map[string]*network.EndpointSettings{}
	if n != nil {
		for k, v := range n.EndpointsConfig {
			if k == network.NetworkDefault {
				k = network.NetworkBridge
			}
			if v == nil {
				v = &network.EndpointSettings{}
			}
			eps[k] = v.Copy()
		}
	}
	if eps[name] == nil {
		if mode.IsDefault() && len(eps) > 0 {
			// Only networks of the user's: the first of them by name is the main one.
			return eps, nil
		}
		eps[name] = &network.EndpointSettings{}
	}
	if (mode.IsHost() || mode.IsNone()) && len(eps) > 1 {
		return nil, fault.New(fault.Invalid, "conflicting options: a container on network %s cannot be attached to others", name)
	}
	for k, v := range eps {
		if len(v.Aliases) > 0 && !mcontainer.NetworkMode(k).IsUserDefined() {
			return nil, fault.New(fault.Invalid, "invalid config for network %s: invalid endpoint settings: network-scoped aliases are only supported for user-defined networks", k)
		}
		if c := v.IPAMConfig; c != nil && k == network.NetworkBridge && (c.IPv4Address.IsValid() || c.IPv6Address.IsValid()) && !mode.IsUserDefined() {
			return nil, fault.New(fault.Invalid, "invalid config for network %s: invalid endpoint settings: user specified IP address is supported on user defined networks only", k)
		}
	}
	return eps, nil
}

// networkName is the name of a mode's network.
func networkName(m mcontainer.NetworkMode) string {
	if m.IsDefault() || m == "" {
		return network.NetworkBridge
	}
	return string(m)
}
