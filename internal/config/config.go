// Package config reads the engine's configuration: one versioned YAML document,
// strictly decoded, overridden by flags. internal/wire turns a Config into an
// engine; nothing else reads configuration.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// Version is the version of the document that this build writes and reads.
const Version = 1

// maxDocument bounds the size of a document in bytes.
const maxDocument = 1 << 20

// Config is the document. Zero values mean the default given with each field.
type Config struct {
	// Version must be 1.
	Version int `yaml:"version"`
	// Root holds what is kept (default /var/lib/servin), RunRoot what a reboot
	// may take (default /run/servin).
	Root    string `yaml:"root"`
	RunRoot string `yaml:"runRoot"`
	// Listen: unix:///path or tcp://host:port (default unix:///run/servin/servin.sock).
	Listen []string `yaml:"listen"`
	// CRI is the socket for a kubelet, unix:///path; empty is off.
	CRI string `yaml:"cri"`
	// CRITCP serves the CRI on a loopback address too, with mutual TLS.
	CRITCP CRITCP `yaml:"criTCP"`
	// InsecureTCP permits a tcp listener without TLS on a loopback address.
	InsecureTCP bool `yaml:"insecureTCP"`
	TLS         TLS  `yaml:"tls"`
	// SocketGroup may use the unix socket (default "servin" if that group exists).
	SocketGroup string `yaml:"socketGroup"`
	// LogLevel is debug, info (default), warn or error; the engine's own log is JSON lines on standard error.
	LogLevel string `yaml:"logLevel"`
	// Metrics is host:port of a listener that serves GET /metrics alone; empty is none.
	Metrics string `yaml:"metrics"`
	// Debug is unix:///path of a socket, the engine's user's alone, that serves
	// profiles of the daemon for go tool pprof; empty is none.
	Debug string `yaml:"debug"`
	// Alerts is a file of alert rules (docs/observability.md); empty is none.
	Alerts string `yaml:"alerts"`
	// Tracing sends OpenTelemetry spans.
	Tracing Tracing `yaml:"tracing"`
	// Pool is how many sandboxes are parked for each kind in use (default 8, 0 parks none).
	Pool *int `yaml:"pool"`

	// Runtimes are further OCI runtimes by name, besides the native one;
	// runc, crun and runsc are known where they are on the PATH.
	Runtimes       map[string]Runtime `yaml:"runtimes"`
	DefaultRuntime string             `yaml:"defaultRuntime"`
	// CgroupDriver is cgroupfs (default) or systemd; CgroupParent the default parent.
	CgroupDriver string `yaml:"cgroupDriver"`
	CgroupParent string `yaml:"cgroupParent"`

	Registries map[string]Registry `yaml:"registries"`
	// MaxDownloads bounds the layers fetched at a time (default 4).
	MaxDownloads int `yaml:"maxDownloads"`
	// LazyPull mounts eStargz and zstd:chunked layers at once and fetches what is
	// read of them, and the rest in the background (default false).
	LazyPull bool `yaml:"lazyPull"`

	Network Network `yaml:"network"`
	CNI     CNI     `yaml:"cni"`
	NRI     NRI     `yaml:"nri"`
	Logs    Logs    `yaml:"logs"`
	Build   Build   `yaml:"build"`
	// Ulimits are defaults for containers, name to "soft:hard" or one number.
	Ulimits map[string]string `yaml:"ulimits"`
	// Init runs the built-in reaper in every container; NoNewPrivileges sets that flag.
	Init            bool   `yaml:"init"`
	NoNewPrivileges bool   `yaml:"noNewPrivileges"`
	SeccompProfile  string `yaml:"seccompProfile"`
	// CDISpecDirs hold the CDI specs of devices (default /etc/cdi and /var/run/cdi).
	CDISpecDirs []string `yaml:"cdiSpecDirs"`
	Labels      []string `yaml:"labels"`
	// Policy is the document of what may run; empty allows everything.
	Policy string `yaml:"policy"`
	Audit  Audit  `yaml:"audit"`
	// Secrets says how secrets are encrypted at rest.
	Secrets Secrets `yaml:"secrets"`
	// ShutdownTimeout bounds ending all containers (default 15s).
	ShutdownTimeout Duration `yaml:"shutdownTimeout"`
}

// Tracing says where spans go. Without an endpoint, OpenTelemetry's own
// variables (OTEL_EXPORTER_OTLP_ENDPOINT …) are heeded.
type Tracing struct {
	// Endpoint is http[s]://host:4318 or grpc[s]://host:4317.
	Endpoint string            `yaml:"endpoint"`
	Headers  map[string]string `yaml:"headers"`
	// Ratio of the traces that begin here to keep (default 1).
	Ratio float64 `yaml:"ratio"`
}

// TLS names the files of a tcp listener; clients must present a certificate that CA signed.
type TLS struct {
	Cert string `yaml:"cert"`
	Key  string `yaml:"key"`
	CA   string `yaml:"ca"`
}

// CRITCP is the CRI's tcp listener; it needs all of its files.
type CRITCP struct {
	// Listen is a loopback address and port, such as 127.0.0.1:10010; empty is off.
	Listen string `yaml:"listen"`
	TLS    `yaml:",inline"`
}

// Runtime is the command of an OCI runtime.
type Runtime struct {
	Path string   `yaml:"path"`
	Args []string `yaml:"args"`
}

// Registry configures access to one registry host (key "*" is every host).
type Registry struct {
	// Mirrors are tried in order before the registry itself: https://host[/path].
	Mirrors []string `yaml:"mirrors"`
	// PlainHTTP speaks http; SkipVerify does not check certificates.
	PlainHTTP  bool   `yaml:"plainHTTP"`
	SkipVerify bool   `yaml:"skipVerify"`
	CA         string `yaml:"ca"`
	Cert       string `yaml:"cert"`
	Key        string `yaml:"key"`
}

// Network holds the defaults of networks.
type Network struct {
	// Pools are ranges that subnets are cut from: base and prefix length of each subnet.
	Pools []Pool `yaml:"pools"`
	// Bridge is the default bridge's subnet, such as 172.17.0.1/16.
	Bridge string `yaml:"bridge"`
	// IPv6 gives new networks IPv6 (default: where the host has it).
	IPv6 *bool `yaml:"ipv6"`
	// MTU of new links, 0 the host's.
	MTU int `yaml:"mtu"`
	// DNS, Search and Options are written to resolv.conf instead of the host's.
	DNS     []string `yaml:"dns"`
	Search  []string `yaml:"dnsSearch"`
	Options []string `yaml:"dnsOptions"`
	// PublishThrough lets every published port bypass the host's input rules.
	PublishThrough bool `yaml:"publishThrough"`
}

// CNI is where the plugins of networks cni:NAME and of pods are.
type CNI struct {
	// ConfDir holds configuration (default /etc/cni/net.d, for an ordinary user
	// ~/.config/cni/net.d); BinDir the plugins (default /opt/cni/bin).
	ConfDir string `yaml:"confDir"`
	BinDir  string `yaml:"binDir"`
	// Require lets pods wait for configuration; without it the engine's own bridge
	// serves where there is none.
	Require bool `yaml:"require"`
}

// NRI is where plugins that watch and change pods come from; all empty is off.
type NRI struct {
	// Socket is where plugins connect that others start (others have
	// /var/run/nri/nri.sock).
	Socket string `yaml:"socket"`
	// PluginDir holds plugins to start (others have /opt/nri/plugins), ConfigDir
	// their configuration (/etc/nri/conf.d).
	PluginDir string `yaml:"pluginDir"`
	ConfigDir string `yaml:"configDir"`
}

// Pool is a range of addresses to cut subnets from.
type Pool struct {
	Base string `yaml:"base"`
	Size int    `yaml:"size"`
}

// Logs are defaults of containers' logs.
type Logs struct {
	// Driver is json-file (default), k8s-file, local, journald, syslog, fluentd or none.
	Driver string `yaml:"driver"`
	// Options are defaults of containers that use Driver, as in --log-opt.
	Options map[string]string `yaml:"options"`
	// MaxSize rotates a file at that size (default 10m, "-1" never), MaxFiles are kept (default 3).
	MaxSize  string `yaml:"maxSize"`
	MaxFiles int    `yaml:"maxFiles"`
}

// Audit says what is recorded of calls, below ROOT/audit.
type Audit struct {
	// Enabled (default true).
	Enabled *bool `yaml:"enabled"`
	// Reads are recorded too, not only calls that change something or read secrets.
	Reads bool `yaml:"reads"`
	// Sync is calls (default: before a call is answered) or second (once a second).
	Sync string `yaml:"sync"`
	// Required refuses calls that cannot be recorded, before they are carried out.
	Required bool `yaml:"required"`
	// MaxSize rotates a file at that size (default 32m), MaxFiles are kept (default 16).
	MaxSize  string `yaml:"maxSize"`
	MaxFiles int    `yaml:"maxFiles"`
}

// Secrets are encrypted with a key file (default ROOT/secrets/key, made at first
// use) or, if that is given, with the passphrase in a file.
type Secrets struct {
	KeyFile        string `yaml:"keyFile"`
	PassphraseFile string `yaml:"passphraseFile"`
}

// Duration is written as 1m30s.
type Duration time.Duration

// UnmarshalYAML reads a duration with a unit.
func (d *Duration) UnmarshalYAML(n *yaml.Node) error {
	v, err := time.ParseDuration(n.Value)
	if err != nil || v < 0 {
		return fmt.Errorf("line %d: %q is no duration (write it as 15s or 1m30s)", n.Line, n.Value)
	}
	*d = Duration(v)
	return nil
}

// Load reads and checks the document at path. Unknown keys are errors.
func Load(path string) (*Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fault.New(fault.NotFound, "cannot read the configuration: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxDocument+1))
	if err != nil {
		return nil, fmt.Errorf("cannot read the configuration: %w", err)
	}
	c, err := Parse(data)
	if err != nil {
		return nil, fault.New(fault.Invalid, "cannot use %s: %w", path, err)
	}
	return c, nil
}

// Parse decodes and checks a document.
func Parse(data []byte) (*Config, error) {
	if len(data) > maxDocument {
		return nil, fault.New(fault.Invalid, "the document is larger than %d bytes", maxDocument)
	}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	dec.KnownFields(true)
	c := new(Config)
	if err := dec.Decode(c); err != nil && !errors.Is(err, io.EOF) {
		return nil, fault.As(fault.Invalid, err)
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, fault.New(fault.Invalid, "there must be one document only")
	}
	if c.Version != Version {
		return nil, fault.New(fault.Invalid, "version is %d; this engine reads version %d (the first line must be \"version: %d\")", c.Version, Version, Version)
	}
	return c, c.Check()
}

// Defaults fills what was left out. Rootless gives the places of an ordinary user.
func (c *Config) Defaults(rootless bool) {
	c.Version = Version
	root, run := "/var/lib/servin", "/run/servin"
	if rootless {
		root, run = UserRoots()
	}
	if c.Root == "" {
		c.Root = root
	}
	if c.RunRoot == "" {
		c.RunRoot = run
	}
	if len(c.Listen) == 0 {
		if rootless {
			c.Listen = []string{"unix://" + filepath.Join(run, "servin.sock")}
		} else {
			c.Listen = []string{"unix://" + api.DefaultSocket}
		}
	}
	if c.LogLevel == "" {
		c.LogLevel = "info"
	}
	if c.Pool == nil {
		n := 8
		c.Pool = &n
	}
	if c.CgroupDriver == "" {
		c.CgroupDriver = "cgroupfs"
	}
	if c.MaxDownloads == 0 {
		c.MaxDownloads = 4
	}
	if c.Logs.Driver == "" {
		c.Logs.Driver = "json-file"
	}
	if c.Logs.MaxSize == "" {
		c.Logs.MaxSize = "10m"
	}
	if c.Logs.MaxFiles == 0 {
		c.Logs.MaxFiles = 3
	}
	if c.CNI.ConfDir == "" {
		c.CNI.ConfDir = "/etc/cni/net.d"
		if rootless {
			c.CNI.ConfDir = filepath.Join(userConfig(), "cni", "net.d")
		}
	}
	if c.CNI.BinDir == "" {
		c.CNI.BinDir = "/opt/cni/bin"
	}
	if c.ShutdownTimeout == 0 {
		c.ShutdownTimeout = Duration(15 * time.Second)
	}
}

// userConfig is where an ordinary user's configuration is.
func userConfig() string {
	if d := os.Getenv("XDG_CONFIG_HOME"); filepath.IsAbs(d) {
		return d
	}
	home, _ := os.UserHomeDir()
	return filepath.Join(home, ".config")
}

// UserRoots are the root and run root of an ordinary user's engine.
func UserRoots() (root, run string) {
	home, _ := os.UserHomeDir()
	data := os.Getenv("XDG_DATA_HOME")
	if data == "" {
		data = filepath.Join(home, ".local", "share")
	}
	return filepath.Join(data, "servin"), filepath.Join(api.UserRuntimeDir(), "servin")
}

// Check says what is wrong with a configuration, if anything.
func (c *Config) Check() error {
	bad := func(format string, args ...any) error { return fault.New(fault.Invalid, format, args...) }
	for name, p := range map[string]string{"policy": c.Policy, "secrets.keyFile": c.Secrets.KeyFile, "secrets.passphraseFile": c.Secrets.PassphraseFile,
		"root": c.Root, "runRoot": c.RunRoot, "seccompProfile": c.SeccompProfile, "alerts": c.Alerts, "cni.confDir": c.CNI.ConfDir, "cni.binDir": c.CNI.BinDir,
		"nri.socket": c.NRI.Socket, "nri.pluginDir": c.NRI.PluginDir, "nri.configDir": c.NRI.ConfigDir} {
		if p != "" && !filepath.IsAbs(p) {
			return bad("%s must be an absolute path, not %q", name, p)
		}
	}
	if c.CRI != "" {
		if rest, ok := strings.CutPrefix(c.CRI, "unix://"); !ok || !filepath.IsAbs(rest) {
			return bad("cannot serve the CRI at %q: write unix:///absolute/path", c.CRI)
		}
	}
	if t := c.CRITCP; t.Listen != "" {
		ap, err := netip.ParseAddrPort(t.Listen)
		if err != nil || !ap.Addr().IsLoopback() {
			return bad("criTCP.listen must be a loopback address and port, such as 127.0.0.1:10010, not %q", t.Listen)
		}
		if t.Cert == "" || t.Key == "" || t.CA == "" {
			return bad("criTCP needs cert, key and ca: whoever speaks the CRI is root on this host")
		}
	}
	if r := c.Tracing.Ratio; r < 0 || r > 1 {
		return bad("tracing.ratio must be from 0 to 1, not %g", r)
	}
	for _, p := range c.CDISpecDirs {
		if !filepath.IsAbs(p) {
			return bad("cdiSpecDirs must be absolute paths, not %q", p)
		}
	}
	for _, l := range c.Listen {
		scheme, rest, ok := strings.Cut(l, "://")
		switch {
		case ok && scheme == "unix" && filepath.IsAbs(rest):
		case ok && scheme == "tcp" && strings.Contains(rest, ":"):
		default:
			return bad("cannot listen on %q: write unix:///absolute/path or tcp://host:port", l)
		}
	}
	switch c.LogLevel {
	case "", "debug", "info", "warn", "error":
	default:
		return bad("logLevel must be debug, info, warn or error, not %q", c.LogLevel)
	}
	if s := c.Audit.Sync; s != "" && s != "calls" && s != "second" {
		return bad("audit.sync must be calls or second, not %q", s)
	}
	if c.Audit.MaxFiles < 0 {
		return bad("audit.maxFiles must be positive, not %d", c.Audit.MaxFiles)
	}
	if c.Pool != nil && (*c.Pool < 0 || *c.Pool > 256) {
		return bad("pool must be from 0 to 256, not %d", *c.Pool)
	}
	switch c.CgroupDriver {
	case "", "cgroupfs", "systemd":
	default:
		return bad("cgroupDriver must be cgroupfs or systemd, not %q", c.CgroupDriver)
	}
	for name, r := range c.Runtimes {
		if name == "" || strings.ContainsAny(name, "/ ") || !filepath.IsAbs(r.Path) {
			return bad("runtime %q needs an absolute path, not %q", name, r.Path)
		}
	}
	for _, p := range c.Network.Pools {
		base, err := netip.ParsePrefix(p.Base)
		if err != nil || p.Size < base.Bits() || p.Size > base.Addr().BitLen()-2 {
			return bad("network pool %q with subnets of /%d makes no sense", p.Base, p.Size)
		}
	}
	if b := c.Network.Bridge; b != "" {
		if _, err := netip.ParsePrefix(b); err != nil {
			return bad("network.bridge must be an address with its prefix, such as 172.17.0.1/16, not %q", b)
		}
	}
	for _, d := range c.Network.DNS {
		if _, err := netip.ParseAddr(d); err != nil {
			return bad("network.dns: %q is no address", d)
		}
	}
	switch c.Logs.Driver {
	case "", "json-file", "k8s-file", "local", "none", "journald", "syslog", "fluentd":
	default:
		return bad("logs.driver must be json-file, k8s-file, local, journald, syslog, fluentd or none, not %q", c.Logs.Driver)
	}
	if err := c.Build.check(); err != nil {
		return err
	}
	for host, r := range c.Registries {
		for _, m := range r.Mirrors {
			if !strings.HasPrefix(m, "https://") && !strings.HasPrefix(m, "http://") {
				return bad("mirror %q of registry %s must begin with https:// or http://", m, host)
			}
		}
	}
	return nil
}
