package engine

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/registry"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/cdi"
	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/event"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/logs"
	"github.com/cloudos-io/cloudos/internal/oci"
	"github.com/cloudos-io/cloudos/internal/runtime"
	"github.com/cloudos-io/cloudos/internal/snapshot"
	"github.com/cloudos-io/cloudos/internal/store"
	"github.com/cloudos-io/cloudos/internal/volume"
)

// Bucket is where container records are stored, in both databases.
const Bucket = "containers"

// Config is what an engine is made of.
type Config struct {
	Root, RunRoot string
	Version       string
	GitCommit     string
	// Driver is the native runtime; it allots ids. Runtimes are further ones by name.
	Driver         runtime.Driver
	Runtimes       map[string]Runtime
	DefaultRuntime string // "" is the native one
	Snapshots      snapshot.Store
	Images         Images
	Toolbox        string // the archive of the image for ContainerDebug, "" for none
	// HostShell decides about shells on the machine; nil is none.
	HostShell HostShell
	Networks  Networks
	Volumes   *volume.Store
	IDMaps    IDMaps
	// Policy says what may be done; nil allows everything.
	Policy Policy
	// Secrets keeps secrets and configs; nil is none.
	Secrets Secrets
	Bus     *event.Bus
	// Durable and Ephemeral hold the records.
	Durable, Ephemeral *store.DB
	Host               oci.Host
	Profiles           *oci.Profiles
	AppArmorProfile    string
	CgroupParent       string // default parent of containers' cgroups
	CgroupV2           bool
	NoCgroups          bool   // rootless without delegation
	CgroupDriver       string // "cgroupfs" or "systemd"
	Rootless           bool
	Defaults           oci.Defaults
	LogMaxSize         int64
	LogMaxFiles        int
	LogDriver          string
	// LogOptions are defaults of containers that use LogDriver.
	LogOptions map[string]string
	// LogShipper sends the logs of remote drivers; nil refuses those.
	LogShipper      LogShipper
	NoNewPrivileges bool
	Init            bool // docker run --init for all
	ShutdownTimeout time.Duration
	Labels          []string
	// RegistryMirrors are shown by info.
	RegistryConfig *registry.ServiceConfig
	// Checks are further questions to the host for doctor.
	Checks func(ctx context.Context) []api.Finding
	// CDI adds devices of CDI specs; nil refuses them.
	CDI *cdi.Injector
	// PublishThrough lets every published port bypass the host's input rules.
	PublishThrough bool
	// Resolver is written to resolv.conf instead of the host's.
	Resolver Resolver
	// PodNetwork gives pods their network; nil runs none. Pause opens the program
	// that is init in pods whose containers share processes.
	PodNetwork PodNetwork
	Pause      func() (*os.File, error)
	// Tracer makes spans of use cases; nil makes none.
	Tracer trace.Tracer
	// Pool is how many sandboxes the driver parks, for info.
	Pool int
	// Ready is when containers may be started again that were to run on; nil: at once.
	Ready  <-chan struct{}
	Logger *slog.Logger
}

// Resolver is what containers' resolv.conf says unless they say otherwise.
type Resolver struct {
	Servers         []netip.Addr
	Search, Options []string
}

// Runtime is another OCI runtime.
type Runtime struct {
	Driver runtime.Driver
	Path   string
	Args   []string
}

// Engine holds the containers of one root.
type Engine struct {
	cfg    Config
	log    *slog.Logger
	names  *store.Names
	bootID string
	self   string // an id of this engine for info
	start  time.Time
	logs   *logs.Watcher

	mu    sync.RWMutex // guards units and tearing
	units map[string]*unit
	// tearing are units that are gone for users while their remains are cleared.
	tearing map[string]*unit

	execs execTable
	pods  pods
	hooks PodHooks // nil: none

	// ctx ends with the engine: background work stops at its next step.
	ctx    context.Context
	cancel context.CancelFunc
	tasks  sync.WaitGroup
	slots  chan struct{} // bounds concurrent teardowns
	closed atomic.Bool
	// noRestarts is set while the engine ends every container.
	noRestarts atomic.Bool
	shutdown   func(containers bool) // tells the daemon to end

	devices deviceCache
	meters  meters
}

// New makes an engine that knows no container yet; Recover loads them.
func New(c Config) (*Engine, error) {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.LogDriver == "" {
		c.LogDriver = "json-file"
	}
	if c.LogMaxSize == 0 {
		c.LogMaxSize = 10 << 20
	}
	if c.LogMaxFiles <= 0 {
		c.LogMaxFiles = 3
	}
	if c.ShutdownTimeout <= 0 {
		c.ShutdownTimeout = 15 * time.Second
	}
	if c.Tracer == nil {
		c.Tracer = noop.NewTracerProvider().Tracer("")
	}
	if c.Profiles == nil {
		c.Profiles = oci.NewProfiles(nil)
	}
	boot, err := BootID()
	if err != nil {
		return nil, err
	}
	e := &Engine{
		cfg: c, log: c.Logger, names: store.NewNames(), bootID: boot, start: time.Now(), logs: logs.NewWatcher(),
		units: map[string]*unit{}, tearing: map[string]*unit{}, slots: make(chan struct{}, 8),
		execs: execTable{m: map[string]*execution{}}, pods: pods{m: map[string]*pod{}, walks: make(chan struct{}, 1)},
	}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	if err := e.checkLogConfig(&mcontainer.LogConfig{}); err != nil {
		return nil, fmt.Errorf("cannot use the defaults of containers' logs: %w", err)
	}
	for _, d := range []string{e.stateDir(false), e.stateDir(true), e.logDir(), e.execDir()} {
		if err := os.MkdirAll(d, 0o711); err != nil {
			return nil, fmt.Errorf("cannot make the containers' directory: %w", err)
		}
	}
	if e.self, err = identity(filepath.Join(c.Root, "engine-id")); err != nil {
		return nil, err
	}
	c.Images.Subscribe(e.imageEvent)
	return e, nil
}

// BootID identifies the host's boot.
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("cannot read the boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// identity reads or makes the random id of this root.
func identity(path string) (string, error) {
	if b, err := os.ReadFile(path); err == nil && len(b) == 36 {
		return string(b), nil
	}
	var r [16]byte
	_, _ = rand.Read(r[:])
	h := hex.EncodeToString(r[:])
	id := h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
	if err := durable.WriteFile(path, []byte(id), 0o600, durable.Everything); err != nil {
		return "", fmt.Errorf("cannot store the engine's id: %w", err)
	}
	return id, nil
}

// OnShutdown sets what POST /servin/shutdown calls once containers are dealt with.
func (e *Engine) OnShutdown(fn func(containers bool)) { e.shutdown = fn }

func (e *Engine) stateDir(ephemeral bool) string {
	if ephemeral {
		return filepath.Join(e.cfg.RunRoot, "containers")
	}
	return filepath.Join(e.cfg.Root, "containers")
}

// logDir holds the logs of ephemeral containers: the run root may be memory.
func (e *Engine) logDir() string { return filepath.Join(e.cfg.Root, "logs") }

// spawn runs fn in a goroutine that Close waits for.
func (e *Engine) spawn(fn func()) {
	e.tasks.Go(fn)
}

// lookup finds a unit by id, name or unique id prefix.
func (e *Engine) lookup(name string) (*unit, error) {
	name = strings.TrimPrefix(name, "/")
	if name == "" {
		return nil, fault.New(fault.Invalid, "No such container: the name is empty")
	}
	e.mu.RLock()
	defer e.mu.RUnlock()
	if u, ok := e.units[name]; ok {
		return u, nil
	}
	if id, ok := e.names.Lookup(name); ok {
		if u, ok := e.units[id]; ok {
			return u, nil
		}
	}
	if parent, alias, ok := strings.Cut(name, "/"); ok {
		if u := e.byLinkLocked(parent, alias); u != nil {
			return u, nil
		}
	}
	if isHex(name) && len(name) < 64 {
		var found *unit
		for id, u := range e.units {
			if strings.HasPrefix(id, name) {
				if found != nil {
					return nil, fault.New(fault.Invalid, "Multiple IDs found with provided prefix: %s", name)
				}
				found = u
			}
		}
		if found != nil {
			return found, nil
		}
	}
	return nil, fault.New(fault.NotFound, "No such container: %s", name)
}

func isHex(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// all returns the units there are, in no order.
func (e *Engine) all() []*unit {
	e.mu.RLock()
	defer e.mu.RUnlock()
	l := make([]*unit, 0, len(e.units))
	for _, u := range e.units {
		l = append(l, u)
	}
	return l
}

// driver finds the runtime that a container asks for.
func (e *Engine) driver(name string) (runtime.Driver, error) {
	if name == "" {
		name = e.cfg.DefaultRuntime
	}
	if name == "" || name == nativeRuntime || name == "io.containerd.runc.v2" {
		return e.cfg.Driver, nil
	}
	if r, ok := e.cfg.Runtimes[name]; ok {
		return r.Driver, nil
	}
	return nil, fault.New(fault.Invalid, "unknown or invalid runtime name: %s", name)
}

// native tells whether a runtime's name stands for our own path.
func (e *Engine) native(name string) bool {
	d, err := e.driver(name)
	return err == nil && d == e.cfg.Driver
}

// nativeRuntime is the name of our own runtime path.
const nativeRuntime = "servin"

// newID makes an id for what the driver does not allot.
func newID() string {
	var b [32]byte
	_, _ = rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// Close stops background work. Containers go on.
func (e *Engine) Close() error {
	e.closed.Store(true)
	e.cancel()
	for _, u := range e.all() {
		u.mu.Lock()
		u.stopTimers()
		u.mu.Unlock()
	}
	e.tasks.Wait()
	return nil
}

// deviceCache keeps the host's device nodes for a moment: privileged containers
// are often started in numbers.
type deviceCache struct {
	mu   sync.Mutex
	at   time.Time
	list []specs.LinuxDevice
}

func (d *deviceCache) get() ([]specs.LinuxDevice, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if time.Since(d.at) < 2*time.Second {
		return d.list, nil
	}
	l, err := oci.HostDevices()
	if err != nil {
		return nil, fmt.Errorf("cannot list the host's devices: %w", err)
	}
	d.list, d.at = l, time.Now()
	return l, nil
}
