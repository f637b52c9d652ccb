// Package wire is the composition root of servind: New reads from top to bottom
// how an engine is put together from its configuration, and System runs its
// parts. Only cmd/servind and tests import it.
package wire

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/registry"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/docker/go-units"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/api/debugshell"
	"github.com/cloudos-io/cloudos/internal/alert"
	"github.com/cloudos-io/cloudos/internal/apparmor"
	"github.com/cloudos-io/cloudos/internal/cdi"
	"github.com/cloudos-io/cloudos/internal/config"
	"github.com/cloudos-io/cloudos/internal/criapi"
	"github.com/cloudos-io/cloudos/internal/dockerapi"
	"github.com/cloudos-io/cloudos/internal/doctor"
	"github.com/cloudos-io/cloudos/internal/engine"
	"github.com/cloudos-io/cloudos/internal/event"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/idmap"
	"github.com/cloudos-io/cloudos/internal/image"
	"github.com/cloudos-io/cloudos/internal/logs/remote"
	"github.com/cloudos-io/cloudos/internal/network"
	"github.com/cloudos-io/cloudos/internal/network/cni"
	"github.com/cloudos-io/cloudos/internal/network/ipam"
	"github.com/cloudos-io/cloudos/internal/nri"
	"github.com/cloudos-io/cloudos/internal/oci"
	"github.com/cloudos-io/cloudos/internal/plugin"
	"github.com/cloudos-io/cloudos/internal/rootless"
	"github.com/cloudos-io/cloudos/internal/runtime/command"
	"github.com/cloudos-io/cloudos/internal/runtime/native"
	"github.com/cloudos-io/cloudos/internal/secret"
	"github.com/cloudos-io/cloudos/internal/shim"
	"github.com/cloudos-io/cloudos/internal/signature"
	"github.com/cloudos-io/cloudos/internal/snapshot/overlay"
	"github.com/cloudos-io/cloudos/internal/store"
	"github.com/cloudos-io/cloudos/internal/tracing"
	"github.com/cloudos-io/cloudos/internal/volume"
)

// System is an engine with all its parts, not yet running.
type System struct {
	Engine  *engine.Engine
	Images  *image.Service
	Handler http.Handler
	// Reload reads again what can be changed while the engine runs: the policy.
	Reload func() error
	// CRI is nil unless the configuration says where it listens.
	CRI *criapi.Server
	// parts run as long as the system does.
	parts  []part
	closes []func() error
	// recovered is closed when the engine knows what there is.
	recovered chan struct{}
	log       *slog.Logger
}

type part struct {
	name string
	run  func(ctx context.Context) error
}

// New builds everything. On failure it closes what it has opened.
func New(ctx context.Context, c *config.Config, inside rootless.State, ready <-chan struct{}, log *slog.Logger) (_ *System, err error) {
	s := &System{log: log, recovered: make(chan struct{})}
	defer func() {
		if err != nil {
			_ = s.close()
		}
	}()

	// The roots. Nobody but us looks inside, yet paths below are bound into
	// containers, whose users must be able to reach them.
	for _, d := range []string{c.Root, c.RunRoot} {
		if err := os.MkdirAll(d, 0o711); err != nil {
			return nil, fmt.Errorf("cannot make %s: %w", d, err)
		}
	}
	if inside.Active && c.CgroupDriver == "systemd" {
		return nil, fault.New(fault.Unsupported, "cannot use the cgroup driver systemd as an ordinary user: the engine governs the subtree delegated to it itself (cgroupDriver: cgroupfs)")
	}
	instance := instanceID(c.Root, c.RunRoot)
	boot, err := engine.BootID()
	if err != nil {
		return nil, err
	}

	tracer, err := tracing.Start(ctx, tracing.Config{Endpoint: c.Tracing.Endpoint, Headers: c.Tracing.Headers, Ratio: c.Tracing.Ratio, Version: api.Version, Instance: instance, Logger: log})
	if err != nil {
		return nil, err
	}
	s.onClose(tracer.Close)

	// Records first: whoever holds them is the one engine of this root.
	durable, err := store.Open(store.Config{Path: filepath.Join(c.Root, "servin.db"), Buckets: []string{engine.Bucket, engine.PodBucket, engine.ImageBucket}})
	if err != nil {
		return nil, err
	}
	s.onClose(durable.Close)
	ephemeral, err := store.Open(store.Config{Path: filepath.Join(c.RunRoot, "ephemeral.db"), Buckets: []string{engine.Bucket}, Ephemeral: true, BootID: boot})
	if err != nil {
		return nil, err
	}
	s.onClose(ephemeral.Close)
	for _, d := range []*store.DB{durable, ephemeral} {
		if d.SetAside != "" {
			log.Error("a damaged database was set aside", "path", d.SetAside)
		}
	}

	// What containers stand on.
	layers, err := overlay.New(overlay.Config{Root: filepath.Join(c.Root, "layers"), Logger: log})
	if err != nil {
		return nil, err
	}
	s.part("layers", layers.Run)
	dockerPlugins := plugin.New(plugin.Config{Dirs: append([]string{filepath.Join(c.RunRoot, "plugins")}, plugin.Dirs[:]...), Logger: log})
	plugins, err := cni.New(cni.Config{
		ConfDir: c.CNI.ConfDir, BinDirs: []string{c.CNI.BinDir}, Root: filepath.Join(c.Root, "cni"), RunRoot: filepath.Join(c.RunRoot, "cni"), Logger: log,
	})
	if err != nil {
		return nil, err
	}
	s.part("cni", plugins.Run)
	netConfig := networkConfig(c, inside, instance, log)
	netConfig.Plugins = dockerPlugins
	netConfig.CNI = plugins
	netConfig.Ready = ready
	networks, err := network.New(ctx, netConfig)
	if err != nil {
		return nil, err
	}
	s.onClose(networks.Close)
	s.part("networks", networks.Run)
	images, err := image.New(ctx, image.Config{
		Root: filepath.Join(c.Root, "images"), Logger: log, Registries: registries(c),
		MaxConcurrentDownloads: c.MaxDownloads, PinnedChains: layers.ChainIDs,
		LazyDir: filepath.Join(c.RunRoot, "lazy"), LazyPull: c.LazyPull,
	})
	if err != nil {
		return nil, err
	}
	s.onClose(images.Close)
	s.part("images", images.Run)
	s.Images = images
	volumes, err := volume.New(volume.Config{
		Root: filepath.Join(c.Root, "volumes"), RunRoot: c.RunRoot, BootID: boot, Log: log,
		Plugins: dockerPlugins,
	})
	if err != nil {
		return nil, err
	}
	s.onClose(volumes.Close)
	s.part("volumes", volumes.Run)
	// What starts them.
	driver, err := native.New(native.Config{
		Root: c.Root, RunRoot: c.RunRoot, Instance: instance, CgroupDriver: c.CgroupDriver, PoolSize: *c.Pool, ParkAfter: s.recovered, Logger: log,
		Rootless: inside.Active, CgroupBase: inside.CgroupBase,
		PrepareLink: func(ctx context.Context, netns *os.File) (any, error) { return networks.PrepareLink(ctx, netns) },
		DropLink: func(ctx context.Context, link any) error {
			l, _ := link.(*network.Link)
			return networks.DropLink(ctx, l)
		},
	})
	if err != nil {
		return nil, err
	}
	s.onClose(driver.Close)
	s.part("runtime", driver.Run)
	host := oci.ProbeHost()
	host.Lacking = driver.Lacking()
	v2 := cgroupV2()
	if inside.Active {
		v2 = driver.CgroupV2()
	}
	var seccomp []byte
	if c.SeccompProfile != "" {
		if seccomp, err = os.ReadFile(c.SeccompProfile); err != nil {
			return nil, fmt.Errorf("cannot read the seccomp profile: %w", err)
		}
	}
	armor := apparmor.New(apparmor.Config{})
	profile, armorWhy := loadAppArmor(ctx, armor, &host, log)
	ids, err := idmap.New(idmap.Config{Dir: filepath.Join(c.Root, "idmap")})
	if err != nil {
		return nil, err
	}
	s.onClose(ids.Close)
	secrets, err := secret.New(secret.Config{
		Dir: filepath.Join(c.Root, "secrets"), KeyFile: c.Secrets.KeyFile, PassphraseFile: c.Secrets.PassphraseFile, Logger: log,
	})
	if err != nil {
		return nil, err
	}
	signatures := signature.New(signature.Config{Dir: filepath.Join(c.Root, "signatures"), Images: images, Logger: log})
	calls, rules, err := s.guards(c, signatures, log)
	if err != nil {
		return nil, err
	}
	admitted := admitting{images, rules, signatures}
	runtimes, err := otherRuntimes(c, instance, log)
	if err != nil {
		return nil, err
	}
	for name, r := range runtimes {
		s.onClose(r.Driver.Close)
		s.part("runtime "+name, r.Driver.Run)
	}
	defaults, err := containerDefaults(c)
	if err != nil {
		return nil, err
	}
	logSize, err := logSize(c.Logs.MaxSize)
	if err != nil {
		return nil, err
	}

	shipper, err := remote.New(remote.Config{Dir: filepath.Join(c.Root, "remote-logs"), Logger: log})
	if err != nil {
		return nil, err
	}
	s.part("remote logs", shipper.Run)

	podBridge := network.NewPodBridge(networks, "")
	if c.CNI.Require {
		podBridge = nil
	}
	podNetwork, err := network.NewPodPlugins(network.PodPluginsConfig{Service: plugins, Bridge: podBridge, Root: filepath.Join(c.Root, "cni")})
	if err != nil {
		return nil, err
	}

	devices := cdi.New(c.CDISpecDirs)

	// The engine and its edges.
	s.Engine, err = engine.New(engine.Config{
		Root: c.Root, RunRoot: c.RunRoot, Version: api.Version, Driver: driver, Runtimes: runtimes, DefaultRuntime: c.DefaultRuntime,
		Snapshots: layers, Images: admitted, Toolbox: toolbox(), HostShell: hostShell{debugshell.Socket}, Networks: networks, Volumes: volumes, IDMaps: ids, Secrets: secrets, Policy: rules, Bus: event.NewBus(event.Config{}),
		Durable: durable, Ephemeral: ephemeral, Host: host, Profiles: oci.NewProfiles(seccomp), AppArmorProfile: profile,
		CgroupParent: c.CgroupParent, CgroupV2: v2, NoCgroups: inside.Active && !v2, CgroupDriver: c.CgroupDriver, Rootless: inside.Active, Defaults: defaults,
		LogDriver: c.Logs.Driver, LogOptions: c.Logs.Options, LogShipper: shipper, LogMaxSize: logSize, LogMaxFiles: c.Logs.MaxFiles, NoNewPrivileges: c.NoNewPrivileges, Init: c.Init,
		ShutdownTimeout: time.Duration(c.ShutdownTimeout), Labels: c.Labels, RegistryConfig: registryInfo(c), Pool: *c.Pool,
		CDI: devices, PublishThrough: c.Network.PublishThrough, Tracer: tracer.Tracer(), Logger: log,
		PodNetwork: podNetwork, Pause: shim.Open, Ready: ready,
		Resolver: engine.Resolver{Servers: addresses(c.Network.DNS), Search: c.Network.Search, Options: c.Network.Options},
		Checks: func(ctx context.Context) []api.Finding {
			return doctor.Judge(doctor.Gather(ctx, doctor.Config{
				Root: c.Root, RunRoot: c.RunRoot, Rootless: inside.Active, Capabilities: host.Capabilities, AppArmor: armorWhy,
			}))
		},
	})
	if err != nil {
		return nil, err
	}
	s.onClose(s.Engine.Close)
	if c.NRI != (config.NRI{}) {
		hooks, err := nri.New(nri.Config{
			Socket: c.NRI.Socket, PluginDir: c.NRI.PluginDir, ConfigDir: c.NRI.ConfigDir, Version: api.Version, Engine: s.Engine,
			Inject: func(ctx context.Context, spec *specs.Spec, names []string) error {
				return devices.Inject(ctx, spec, []mcontainer.DeviceRequest{{Driver: "cdi", DeviceIDs: names}})
			},
			Ready: s.recovered, Logger: log,
		})
		if err != nil {
			return nil, err
		}
		s.Engine.SetPodHooks(hooks)
		s.part("nri", hooks.Run)
	}
	if c.CRI == "" && c.CRITCP.Listen != "" {
		return nil, fault.New(fault.Invalid, "cannot serve the CRI at %s alone: give its socket, too (cri, or --cri)", c.CRITCP.Listen)
	}
	if c.CRI != "" {
		s.CRI = criapi.New(criapi.Config{
			Audit:  calls,
			Engine: s.Engine, Images: admitted, Socket: c.CRI, TCP: c.CRITCP.Listen, Cert: c.CRITCP.Cert, Key: c.CRITCP.Key, CA: c.CRITCP.CA,
			Version: api.Version, Logger: log,
		})
	}
	builder := newBuilder(c, inside, instance, profile, images, networks, admitted, log)
	s.part("builder", builder.Run)
	var alerts dockerapi.Alerts
	if c.Alerts != "" {
		w, err := alert.New(alert.Config{Path: c.Alerts, Source: readings{s.Engine}, Logger: log})
		if err != nil {
			return nil, err
		}
		s.part("alerts", w.Run)
		alerts = w
	}
	s.Handler = dockerapi.New(dockerapi.Config{
		Builds:     builder,
		Containers: s.Engine, Images: admitted, Networks: s.Engine.NetworkService(), Volumes: s.Engine.VolumeService(), VolumeCopies: s.Engine.VolumeService(), Checkpoints: s.Engine,
		Secrets: s.Engine.SecretService(),
		Audit:   calls, Policy: policing{rules, s.Engine},
		System: s.Engine.SystemService(), Logger: log, Version: api.Version,
		Problems: images.LazyTrouble, Alerts: alerts, Tracer: tracer.Tracer(),
		OS: operatingSystem(log), DebugShell: hostShell{debugshell.Socket},
	})
	return s, nil
}

func (s *System) onClose(fn func() error) { s.closes = append(s.closes, fn) }
func (s *System) part(name string, run func(context.Context) error) {
	s.parts = append(s.parts, part{name, run})
}

func (s *System) close() error {
	var errs []error
	for i := len(s.closes) - 1; i >= 0; i-- {
		errs = append(errs, s.closes[i]())
	}
	s.closes = nil
	return errors.Join(errs...)
}

// Run starts the parts, takes over what an earlier engine left and calls serve;
// when that returns, everything is stopped again. Containers go on.
func (s *System) Run(ctx context.Context, serve func(ctx context.Context) error) error {
	bg, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	ended := make(chan error, len(s.parts))
	for _, p := range s.parts {
		go func() {
			err := p.run(bg)
			if err != nil && bg.Err() == nil {
				s.log.Error("a part of the engine ended", "part", p.name, "cause", err)
			}
			ended <- err
		}()
	}
	err := s.Engine.Recover(ctx)
	if err == nil {
		close(s.recovered)
		// Before the first request: whoever asks for the built-in image must not
		// be sent to a registry for it. It is there from the second start on.
		if err := s.Images.EnsureEmbedded(bg); err != nil && bg.Err() == nil {
			s.log.Warn("cannot load the built-in image", "cause", err)
		}
		err = s.serve(ctx, bg, serve)
	}
	cancel()
	patience := time.After(10 * time.Second)
	for range s.parts {
		select {
		case <-ended:
		case <-patience:
			s.log.Warn("a part of the engine does not end")
		}
	}
	return errors.Join(err, s.close())
}

// serve serves the CRI, where it is wanted, beside what serve serves.
func (s *System) serve(ctx, bg context.Context, serve func(ctx context.Context) error) error {
	if s.CRI == nil {
		return serve(ctx)
	}
	if err := s.CRI.Listen(); err != nil {
		return err
	}
	bg, cancel := context.WithCancel(bg)
	done := make(chan error, 1)
	go func() { done <- s.CRI.Serve(bg) }()
	err := serve(ctx)
	cancel()
	return errors.Join(err, <-done)
}

// instanceID tells engines on one host apart by their roots.
func instanceID(root, runRoot string) string {
	sum := sha256.Sum256([]byte(filepath.Clean(root) + "\x00" + filepath.Clean(runRoot)))
	return hex.EncodeToString(sum[:4])
}

func registries(c *config.Config) image.Registries {
	r := image.Registries{Hosts: map[string]image.Registry{}, CertDirs: []string{"/etc/servin/certs.d", "/etc/docker/certs.d"}, UserAgent: "servin/" + api.Version}
	for host, x := range c.Registries {
		r.Hosts[host] = image.Registry{Mirrors: x.Mirrors, PlainHTTP: x.PlainHTTP, SkipVerify: x.SkipVerify}
	}
	return r
}

// registryInfo is what info shows of them.
func registryInfo(c *config.Config) *registry.ServiceConfig {
	s := &registry.ServiceConfig{IndexConfigs: map[string]*registry.IndexInfo{
		"docker.io": {Name: "docker.io", Mirrors: []string{}, Secure: true, Official: true},
	}, Mirrors: []string{}}
	for _, p := range []string{"127.0.0.0/8", "::1/128"} {
		s.InsecureRegistryCIDRs = append(s.InsecureRegistryCIDRs, netip.MustParsePrefix(p))
	}
	for host, x := range c.Registries {
		if host == "docker.io" || host == "*" {
			s.Mirrors = append(s.Mirrors, x.Mirrors...)
		}
		if host != "*" && host != "docker.io" {
			s.IndexConfigs[host] = &registry.IndexInfo{Name: host, Mirrors: x.Mirrors, Secure: !x.PlainHTTP && !x.SkipVerify}
		}
	}
	return s
}

func networkConfig(c *config.Config, inside rootless.State, instance string, log *slog.Logger) network.Config {
	n := network.Config{Root: filepath.Join(c.Root, "networks"), RunRoot: filepath.Join(c.RunRoot, "networks"), Instance: instance, Logger: log, MTU: c.Network.MTU, Relay: shim.Open}
	for _, p := range c.Network.Pools {
		n.DefaultPools = append(n.DefaultPools, ipam.Block{Base: netip.MustParsePrefix(p.Base), Size: p.Size}) // checked when read
	}
	if c.Network.Bridge != "" {
		n.Subnet = netip.MustParsePrefix(c.Network.Bridge)
	}
	if v := c.Network.IPv6; v != nil {
		n.IPv6 = "off"
		if *v {
			n.IPv6 = "on"
		}
	}
	if inside.Active {
		n.HostPorts = hostPorts(inside, c.RunRoot, log)
	}
	return n
}

// hostPorts tells how an ordinary user's engine publishes on the host.
func hostPorts(inside rootless.State, runRoot string, log *slog.Logger) network.HostPorts {
	h := network.HostPorts{First: inside.FirstPort, Listen: inside.Link == rootless.Pasta}
	f := inside.Forwarder(runRoot)
	if f == nil {
		return h
	}
	if err := f.Reset(); err != nil {
		log.Warn("cannot end the port forwardings of a former engine", "cause", err)
	}
	h.Arrive = rootless.SlirpGuest
	h.Forward = func(proto string, host netip.AddrPort) (func() error, error) {
		id, err := f.Add(proto, host)
		if err != nil {
			log.Warn(err.Error())
			return nil, err
		}
		return func() error { return f.Remove(id) }, nil
	}
	return h
}

func addresses(l []string) []netip.Addr {
	var out []netip.Addr
	for _, s := range l {
		out = append(out, netip.MustParseAddr(s)) // checked when read
	}
	return out
}

// loadAppArmor loads the default profile where the kernel has AppArmor.
func loadAppArmor(ctx context.Context, l *apparmor.Loader, host *oci.Host, log *slog.Logger) (profile, why string) {
	ok, why := l.Supported()
	if !ok {
		host.AppArmor = false
		return "", why
	}
	if err := l.Ensure(ctx); err != nil {
		log.Warn("containers run without AppArmor", "cause", err)
		host.AppArmor = false
		return "", err.Error()
	}
	return apparmor.DefaultProfile, ""
}

func cgroupV2() bool {
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	return err == nil
}

// otherRuntimes are the configured OCI runtimes and those found on the path.
func otherRuntimes(c *config.Config, instance string, log *slog.Logger) (map[string]engine.Runtime, error) {
	all := map[string]config.Runtime{}
	for _, name := range []string{"runc", "crun", "runsc"} {
		if p, err := exec.LookPath(name); err == nil {
			all[name] = config.Runtime{Path: p}
		}
	}
	for name, r := range c.Runtimes {
		all[name] = r
	}
	out := map[string]engine.Runtime{}
	for name, r := range all {
		d, err := command.New(command.Config{Name: name, Path: r.Path, Args: r.Args, RunRoot: c.RunRoot, Instance: instance + "-" + name, SystemdCgroup: c.CgroupDriver == "systemd", Logger: log})
		if err != nil {
			return nil, err
		}
		out[name] = engine.Runtime{Driver: d, Path: r.Path, Args: r.Args}
	}
	if d := c.DefaultRuntime; d != "" && d != "servin" {
		if _, ok := out[d]; !ok {
			return nil, fmt.Errorf("cannot use %q as default runtime: it is neither configured nor on the path", d)
		}
	}
	return out, nil
}

func containerDefaults(c *config.Config) (oci.Defaults, error) {
	d := oci.Defaults{Ulimits: map[string]*mcontainer.Ulimit{}}
	for name, v := range c.Ulimits {
		u, err := units.ParseUlimit(name + "=" + v)
		if err != nil {
			return d, fmt.Errorf("cannot use ulimit %s: %w", name, err)
		}
		d.Ulimits[name] = u
	}
	return d, nil
}

// logSize reads the size at which logs rotate; -1 is never.
func logSize(s string) (int64, error) {
	if s == "-1" {
		return -1, nil
	}
	n, err := units.RAMInBytes(s)
	if err != nil || n <= 0 {
		return 0, fmt.Errorf("cannot use logs.maxSize %q: write it as 10m", s)
	}
	return n, nil
}

// SocketGroup is the group that may use the engine's socket: the configured
// one, or "servin" where the host has it.
func SocketGroup(c *config.Config) string {
	if c.SocketGroup != "" {
		return c.SocketGroup
	}
	if g, err := user.LookupGroup("servin"); err == nil {
		if _, err := strconv.Atoi(strings.TrimSpace(g.Gid)); err == nil {
			return "servin"
		}
	}
	return ""
}
