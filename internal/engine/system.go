package engine

import (
	"context"
	"maps"
	"os"
	goruntime "runtime"
	"slices"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/build"
	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	mimage "github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/api/types/system"
	"github.com/moby/moby/api/types/volume"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/image"
)

// SystemService is the use cases about the engine as a whole.
type SystemService struct{ e *Engine }

// SystemService returns the use cases about the engine as a whole.
func (e *Engine) SystemService() *SystemService { return &SystemService{e} }

// imageEvent puts what happens to images on the bus.
func (e *Engine) imageEvent(ev image.Event) {
	attrs := make(map[string]string, len(ev.Labels)+1)
	maps.Copy(attrs, ev.Labels)
	id, name := ev.ID, ev.Ref
	switch a := events.Action(ev.Action); {
	case a == events.ActionPull || a == events.ActionPush:
		id = ev.Ref
		if n, err := reference.ParseNormalizedNamed(ev.Ref); err == nil {
			name = reference.FamiliarName(n)
		}
	case name == "":
		name = ev.ID
	}
	attrs["name"] = name
	e.emit(events.ImageEventType, events.Action(ev.Action), id, attrs)
}

// Info describes the engine and its host.
func (s *SystemService) Info(ctx context.Context) (*system.Info, error) {
	e := s.e
	var uts unix.Utsname
	_ = unix.Uname(&uts)
	host, _ := os.Hostname()
	out := &system.Info{
		ID: e.self, Driver: storageDriver, DriverStatus: [][2]string{{"Backing Filesystem", "overlayfs"}, {"Native Overlay Diff", "true"}},
		MemoryLimit: e.limits("memory"), SwapLimit: e.cfg.Host.SwapLimit && e.limits("memory"), CPUCfsPeriod: e.limits("cpu"), CPUCfsQuota: e.limits("cpu"),
		CPUShares: e.limits("cpu"), CPUSet: e.limits("cpuset"), PidsLimit: e.limits("pids"),
		IPv4Forwarding: strings.TrimSpace(string(readSmall("/proc/sys/net/ipv4/ip_forward"))) == "1",
		OomKillDisable: !e.cfg.CgroupV2, NFd: countDir("/proc/self/fd"), NGoroutines: goruntime.NumGoroutine(),
		SystemTime: time.Now().Format(time.RFC3339Nano), LoggingDriver: e.cfg.LogDriver, CgroupDriver: e.cfg.CgroupDriver, CgroupVersion: "1",
		NEventsListener: e.cfg.Bus.Listeners(), KernelVersion: unix.ByteSliceToString(uts.Release[:]), OSType: "linux",
		Architecture: unix.ByteSliceToString(uts.Machine[:]), IndexServerAddress: "https://index.docker.io/v1/", RegistryConfig: e.cfg.RegistryConfig,
		NCPU: e.cfg.Host.CPUs, MemTotal: memTotal(), DockerRootDir: e.cfg.Root, Name: host, Labels: e.cfg.Labels,
		ServerVersion: e.cfg.Version, DefaultRuntime: nativeRuntime, LiveRestoreEnabled: true, ExperimentalBuild: true, InitBinary: "servin-init",
		Swarm: swarm.Info{LocalNodeState: swarm.LocalNodeStateInactive}, CDISpecDirs: s.cdiDirs(),
		Runtimes: map[string]system.RuntimeWithStatus{nativeRuntime: {Runtime: system.Runtime{Path: "servin-shim"}}},
		Plugins: system.PluginsInfo{Volume: e.cfg.Volumes.Drivers(ctx), Network: e.networkDrivers(ctx),
			Log: e.logDrivers()},
		FirewallBackend: &system.FirewallInfo{Driver: "nftables"},
		SecurityOptions: e.securityOptions(), HTTPProxy: os.Getenv("HTTP_PROXY"), HTTPSProxy: os.Getenv("HTTPS_PROXY"), NoProxy: os.Getenv("NO_PROXY"),
	}
	if e.cfg.CgroupV2 {
		out.CgroupVersion = "2"
	}
	if e.cfg.DefaultRuntime != "" {
		out.DefaultRuntime = e.cfg.DefaultRuntime
	}
	if out.RegistryConfig == nil {
		out.RegistryConfig = &registry.ServiceConfig{IndexConfigs: map[string]*registry.IndexInfo{}}
	}
	for name, r := range e.cfg.Runtimes {
		out.Runtimes[name] = system.RuntimeWithStatus{Runtime: system.Runtime{Path: r.Path, Args: r.Args}}
	}
	out.OperatingSystem, out.OSVersion = osRelease()
	for _, u := range e.all() {
		if u.rec.Load().Pod != nil {
			continue
		}
		out.Containers++
		switch u.rec.Load().State.Status {
		case mcontainer.StateRunning, mcontainer.StateRestarting:
			out.ContainersRunning++
		case mcontainer.StatePaused:
			out.ContainersPaused++
		default:
			out.ContainersStopped++
		}
	}
	if l, err := e.cfg.Images.List(ctx, nil, false, false, false); err == nil {
		out.Images = len(l)
	}
	if e.cfg.NoCgroups {
		out.CgroupDriver, out.CgroupVersion = "none", ""
	}
	for _, w := range append(lackingWarnings(e.cfg.Host.Lacking), e.logTrouble()...) {
		out.Warnings = append(out.Warnings, "WARNING: "+w)
	}
	if l, ok := e.cfg.Images.(interface{ LazyTrouble() []string }); ok {
		for _, w := range l.LazyTrouble() {
			out.Warnings = append(out.Warnings, "WARNING: "+w)
		}
	}
	if !out.SwapLimit && e.limits("memory") {
		out.Warnings = append(out.Warnings, "WARNING: No swap limit support")
	}
	if !out.IPv4Forwarding {
		out.Warnings = append(out.Warnings, "WARNING: IPv4 forwarding is disabled")
	}
	return out, nil
}

// networkDrivers are ours and those that are plugins.
func (e *Engine) networkDrivers(ctx context.Context) []string {
	l := []string{"bridge", "host", "ipvlan", "macvlan", "null"}
	if p, ok := e.cfg.Networks.(interface {
		Drivers(context.Context) []string
	}); ok {
		l = append(l, p.Drivers(ctx)...)
	}
	return l
}

// limits reports whether containers can be limited with a cgroup controller.
func (e *Engine) limits(controller string) bool { return e.cfg.Host.Lacking[controller] == "" }

// lackingWarnings says each reason once, with all that it stands in the way of.
func lackingWarnings(lacking map[string]string) []string {
	by := map[string][]string{}
	for _, c := range slices.Sorted(maps.Keys(lacking)) {
		by[lacking[c]] = append(by[lacking[c]], c)
	}
	var out []string
	for _, why := range slices.Sorted(maps.Keys(by)) {
		out = append(out, "No limits of "+strings.Join(by[why], ", ")+": "+why)
	}
	return out
}

func (e *Engine) securityOptions() []string {
	var l []string
	if e.cfg.Host.AppArmor {
		l = append(l, "name=apparmor")
	}
	if e.cfg.Host.Seccomp {
		l = append(l, "name=seccomp,profile=builtin")
	}
	if e.cfg.Host.SELinux {
		l = append(l, "name=selinux")
	}
	if e.cfg.Rootless {
		l = append(l, "name=rootless")
	}
	return append(l, "name=cgroupns")
}

func countDir(path string) int {
	d, err := os.Open(path)
	if err != nil {
		return 0
	}
	defer d.Close()
	l, _ := d.Readdirnames(-1)
	return len(l)
}

func memTotal() int64 {
	var si unix.Sysinfo_t
	if unix.Sysinfo(&si) != nil {
		return 0
	}
	return int64(si.Totalram) * int64(si.Unit)
}

func osRelease() (name, version string) {
	name = "Linux"
	for l := range strings.SplitSeq(string(readSmall("/etc/os-release")), "\n") {
		k, v, _ := strings.Cut(l, "=")
		v = strings.Trim(v, `"'`)
		switch k {
		case "PRETTY_NAME":
			name = v
		case "VERSION_ID":
			version = v
		}
	}
	return name, version
}

// Version tells what this engine is.
func (s *SystemService) Version(context.Context) (system.VersionResponse, error) {
	var uts unix.Utsname
	_ = unix.Uname(&uts)
	v := s.e.cfg.Version
	return system.VersionResponse{
		Platform: system.PlatformInfo{Name: "Servin"}, Experimental: true, Version: v, Os: goruntime.GOOS, Arch: goruntime.GOARCH,
		GitCommit: s.e.cfg.GitCommit, GoVersion: goruntime.Version(), KernelVersion: unix.ByteSliceToString(uts.Release[:]),
		Components: []system.ComponentVersion{{Name: "Engine", Version: v, Details: map[string]string{
			"GitCommit": s.e.cfg.GitCommit, "GoVersion": goruntime.Version(), "Os": goruntime.GOOS, "Arch": goruntime.GOARCH,
			"KernelVersion": unix.ByteSliceToString(uts.Release[:]), "Experimental": "true",
		}}},
	}, nil
}

func (s *SystemService) cdiDirs() []string {
	if s.e.cfg.CDI == nil {
		return []string{}
	}
	return s.e.cfg.CDI.Dirs()
}

// DiskUsage measures what containers, images and volumes take. Items are listed
// with verbose alone.
func (s *SystemService) DiskUsage(ctx context.Context, types []string, verbose bool) (system.DiskUsage, error) {
	e := s.e
	var out system.DiskUsage
	want := func(t system.DiskUsageObject) bool { return len(types) == 0 || slices.Contains(types, string(t)) }
	for _, t := range types {
		switch system.DiskUsageObject(t) {
		case system.ContainerObject, system.ImageObject, system.VolumeObject, system.BuildCacheObject:
		default:
			return out, fault.New(fault.Invalid, "unknown object type: %s", t)
		}
	}
	inUse := map[string]int64{}
	for _, u := range e.all() {
		inUse[u.rec.Load().Image.ID]++
	}
	if want(system.ContainerObject) {
		du := &mcontainer.DiskUsage{}
		l, err := e.ContainerList(ctx, ListOptions{All: true})
		if err != nil {
			return out, err
		}
		for i := range l {
			size, err := e.cfg.Snapshots.Usage(ctx, l[i].ID)
			if err != nil {
				continue // removed meanwhile
			}
			l[i].SizeRw = size
			du.TotalSize += size
			du.TotalCount++
			switch l[i].State {
			case mcontainer.StateRunning, mcontainer.StatePaused, mcontainer.StateRestarting:
				du.ActiveCount++
			default:
				du.Reclaimable += size
			}
		}
		if verbose {
			du.Items = l
		}
		out.ContainerUsage = du
	}
	if want(system.ImageObject) {
		du := &mimage.DiskUsage{}
		l, err := e.cfg.Images.List(ctx, nil, false, true, false)
		if err != nil {
			return out, err
		}
		total, err := e.cfg.Images.Usage(ctx)
		if err != nil {
			return out, err
		}
		du.TotalSize, du.TotalCount = total, int64(len(l))
		var used int64
		for i := range l {
			l[i].Containers = inUse[l[i].ID]
			if l[i].Containers > 0 {
				du.ActiveCount++
				used += l[i].Size
			}
		}
		du.Reclaimable = max(total-used, 0)
		if verbose {
			du.Items = l
		}
		out.ImageUsage = du
	}
	if want(system.VolumeObject) {
		du := &volume.DiskUsage{}
		l, _, err := e.cfg.Volumes.List(ctx, nil)
		if err != nil {
			return out, err
		}
		vs := e.VolumeService()
		for i := range l {
			refs := int64(len(e.cfg.Volumes.References(l[i].Name)))
			size := vs.size(ctx, l[i].Name)
			l[i].UsageData = &volume.UsageData{RefCount: refs, Size: size}
			du.TotalCount++
			du.TotalSize += max(size, 0)
			if refs > 0 {
				du.ActiveCount++
			} else {
				du.Reclaimable += max(size, 0)
			}
		}
		if verbose {
			du.Items = l
		}
		out.VolumeUsage = du
	}
	if want(system.BuildCacheObject) {
		out.BuildCacheUsage = &build.DiskUsage{}
	}
	return out, nil
}

// Doctor looks for what would make trouble on this host.
func (s *SystemService) Doctor(ctx context.Context) ([]api.Finding, error) {
	var out []api.Finding
	if s.e.cfg.Checks != nil {
		out = append(out, s.e.cfg.Checks(ctx)...)
	}
	for _, f := range s.e.cfg.Networks.Doctor(ctx) {
		out = append(out, api.Finding{Severity: f.Severity, Title: f.Title, Detail: f.Detail, Fix: f.Fix, Action: f.Action})
	}
	return out, nil
}

// Fix carries out actions that Doctor offers and the user agreed to.
func (s *SystemService) Fix(ctx context.Context, req api.FixRequest) (api.FixReport, error) {
	if len(req.Actions) == 0 {
		return api.FixReport{}, fault.New(fault.Invalid, "cannot fix: name the actions that were agreed to")
	}
	done, err := s.e.cfg.Networks.AllowForward(ctx, req.Actions)
	return api.FixReport{Done: done}, err
}

// ImageInUse tells which containers use an image id: container id to whether it
// runs. Kubernetes counts as one that does not.
func (s *SystemService) ImageInUse(id string) map[string]bool {
	m := s.e.ImageUsers(id)
	if len(m) == 0 && s.e.PodImage(id) {
		m[NamespaceKubernetes] = false
	}
	return m
}

// Prune removes what nothing uses.
func (s *SystemService) Prune(ctx context.Context, o api.PruneRequest) (api.PruneReport, error) {
	var rep api.PruneReport
	e := s.e
	c, err := e.ContainerPrune(ctx, o.Filters)
	if err != nil {
		return rep, err
	}
	rep.Containers, rep.SpaceReclaimed = c.ContainersDeleted, c.SpaceReclaimed
	n, err := e.NetworkService().NetworkPrune(ctx, o.Filters)
	if err != nil {
		return rep, err
	}
	rep.Networks = n.NetworksDeleted
	if o.Volumes {
		f := Filters{}
		for k, v := range o.Filters {
			if k != "until" { // volumes know no age
				f[k] = v
			}
		}
		v, err := e.VolumeService().VolumePrune(ctx, f)
		if err != nil {
			return rep, err
		}
		rep.Volumes = v.VolumesDeleted
		rep.SpaceReclaimed += v.SpaceReclaimed
	}
	f := Filters{"dangling": {"true": true}}
	if o.All {
		f["dangling"] = map[string]bool{"false": true}
	}
	for k, v := range o.Filters {
		f[k] = v
	}
	img, err := e.cfg.Images.Prune(ctx, f, func(d digest.Digest) map[string]bool { return s.ImageInUse(d.String()) })
	if err != nil {
		return rep, err
	}
	for _, d := range img.ImagesDeleted {
		if d.Deleted != "" {
			rep.Images = append(rep.Images, d.Deleted)
		} else {
			rep.Images = append(rep.Images, d.Untagged)
		}
	}
	rep.SpaceReclaimed += img.SpaceReclaimed
	return rep, nil
}

// Events replays from since (if set) and follows until until or ctx ends.
func (s *SystemService) Events(ctx context.Context, since, until time.Time, f Filters, emit func(events.Message) error) error {
	match, err := eventFilter(f)
	if err != nil {
		return err
	}
	sub, old := s.e.cfg.Bus.Subscribe(since)
	defer sub.Close()
	for _, m := range old {
		if !until.IsZero() && m.TimeNano > until.UnixNano() {
			return nil
		}
		if match(m) {
			if err := emit(m); err != nil {
				return err
			}
		}
	}
	if !until.IsZero() {
		if !until.After(time.Now()) {
			return nil
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, until)
		defer cancel()
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.e.ctx, cancel)()
	for {
		m, ok := sub.Next(ctx)
		if !ok {
			if sub.Lagged() {
				return fault.New(fault.Unavailable, "cannot go on with events: the client reads too slowly; ask again with since")
			}
			return nil
		}
		if match(m) {
			if err := emit(m); err != nil {
				return err
			}
		}
	}
}

// eventFilter makes the test for Docker's event filters.
func eventFilter(f Filters) (func(events.Message) bool, error) {
	if err := checkFilters(f, "config", "container", "daemon", "event", "image", "label", "namespace", "network", "node", "plugin", "scope", "secret", "service", "type", "volume", "builder"); err != nil {
		return nil, err
	}
	has := func(key, v string) bool { l := f[key]; return len(l) == 0 || l[v] }
	object := func(key string, m events.Message) bool {
		l := f[key]
		if len(l) == 0 {
			return true
		}
		if string(m.Type) != key {
			return false
		}
		for v, on := range l {
			if on && (strings.HasPrefix(m.Actor.ID, v) || strings.HasPrefix(m.Actor.Attributes["name"], v)) {
				return true
			}
		}
		return false
	}
	labels := values(f, "label")
	return func(m events.Message) bool {
		action, _, _ := strings.Cut(string(m.Action), ": ")
		if !has("event", string(m.Action)) && !has("event", action) || !has("type", string(m.Type)) || !has("scope", m.Scope) {
			return false
		}
		if !labelsMatch(m.Actor.Attributes, labels) || !inNamespace(f, m.Actor.Attributes[attrPod] != "") {
			return false
		}
		// Filters of one key are alternatives; those of several objects, too.
		any, some := false, false
		for _, k := range []string{"container", "image", "network", "volume", "daemon", "plugin", "builder"} {
			if len(f[k]) > 0 {
				some = true
				any = any || k == "image" && ofImage(f[k], m) || k != "image" && object(k, m)
			}
		}
		return !some || any
	}, nil
}

// ofImage tells an event of an image, or of a container made of it.
func ofImage(want map[string]bool, m events.Message) bool {
	name := m.Actor.Attributes["image"]
	if m.Type == events.ImageEventType {
		name = m.Actor.Attributes["name"]
	}
	for _, s := range []string{m.Actor.ID, name} {
		if want[s] || want[withoutTag(s)] {
			return true
		}
	}
	return false
}

func withoutTag(ref string) string {
	n, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return ref
	}
	return reference.FamiliarName(n)
}
