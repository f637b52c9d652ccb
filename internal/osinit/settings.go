package osinit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/osinit/config"
	"github.com/cloudos-io/cloudos/internal/osinit/source"
	"github.com/cloudos-io/cloudos/internal/osinit/uplink"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// configFile is where the API keeps the document.
const configFile = "/var/lib/cloudos/config.yaml"

// configure finds and applies the configuration. The network is up with what the
// machine knows before it asks anybody, and again with what it then learns.
func (m *machine) configure(ctx context.Context) (*config.Document, error) {
	p := source.Places{
		CommandLine: m.cmdline["config"], Disk: configFile, Volumes: m.cidata, Image: config.InImage,
		Vendor: dmi("sys_vendor"), Product: dmi("product_name"), Asset: dmi("chassis_asset_tag"), Log: m.log.Printf,
	}
	if m.dataKind != "disk" {
		p.Disk = ""
	}
	if p.Remote() {
		m.meet()
		m.connectTo(ctx, uplink.Config{})
		p.Online = m.net.Online()
	}
	f, err := p.Find(ctx)
	m.mu.Lock()
	m.configSource = f.Source
	if f.Source == "" {
		m.configSource = "default"
	}
	m.mu.Unlock()
	if err != nil {
		return new(config.Document), err
	}
	doc := new(config.Document)
	if len(f.Document) > 0 {
		if doc, err = config.Parse(f.Document); err != nil {
			return new(config.Document), fault.New(fault.Invalid, "cannot use the configuration (from %s): %w", f.Source, err)
		}
	}
	if err := m.believe(f, doc); err != nil {
		return new(config.Document), err
	}
	m.mu.Lock()
	m.document = f.Document
	m.host = doc.Hostname
	if short, _, _ := strings.Cut(f.Hostname, "."); m.host == "" && config.IsHostname(short) {
		m.host = short
	}
	m.mu.Unlock()
	return doc, nil
}

// apply makes the machine as the document says.
func (m *machine) apply(ctx context.Context, doc *config.Document) {
	m.nameHost()
	if !m.distribution && (m.net == nil || len(doc.Network.Links)+len(doc.Network.DNS) > 0) {
		c := doc.Network
		if word := m.cmdline["net"]; word != "" && len(c.Links) == 0 {
			if err := giveAddress(&c, word); err != nil {
				m.problem(err)
			}
		}
		m.connectTo(ctx, c)
	}
	for _, name := range doc.Modules {
		if !m.modules.Has(name) {
			m.log.Printf("the image has no module %s", name)
		}
	}
	if err := m.modules.LoadAll(doc.Modules...); err != nil {
		m.problem(err)
	}
	if len(doc.Trust) > 0 {
		b, err := os.ReadFile(certFile)
		if err == nil {
			b = append(b, []byte("\n"+strings.Join(doc.Trust, "\n")+"\n")...)
			err = os.WriteFile(trustFile, b, 0o644)
		}
		if err != nil {
			m.problem(fmt.Errorf("cannot add authorities: %w", err))
		}
	}
	m.engineArgs = []string{"--listen", "unix://" + engineSocket}
	b, err := m.engineDocument(doc)
	if err != nil {
		m.problem(err)
		return
	}
	if len(b) > 0 {
		if err := os.WriteFile(engineConfig, b, 0o600); err != nil {
			m.problem(err)
			return
		}
		m.engineArgs = append(m.engineArgs, "--config", engineConfig)
		for _, l := range doc.EngineListens() {
			m.engineArgs = append(m.engineArgs, "--listen", l)
		}
	}
}

const (
	// tlsDir has what the document says of the engine's listeners, in memory.
	tlsDir       = "/run/cloudos/tls"
	certFile     = "/etc/ssl/certs/ca-certificates.crt"
	trustFile    = "/run/cloudos/ca-certificates.crt"
	engineConfig = "/run/cloudos/servind.yaml"
)

// engineDocument is the engine's own, with the files that the section tls becomes.
func (m *machine) engineDocument(doc *config.Document) ([]byte, error) {
	b := doc.EngineDocument()
	if doc.TLS == (config.TLS{}) {
		return b, nil
	}
	fail := func(err error) ([]byte, error) {
		return nil, fmt.Errorf("cannot prepare the engine's certificate: %w", err)
	}
	if err := os.MkdirAll(tlsDir, 0o700); err != nil {
		return fail(err)
	}
	files := map[string]any{}
	for name, text := range map[string]string{"cert": doc.TLS.Cert, "key": doc.TLS.Key, "ca": doc.TLS.CA} {
		p := filepath.Join(tlsDir, name+".pem")
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			return fail(err)
		}
		files[name] = p
	}
	if len(b) == 0 {
		b = []byte("version: 1\n")
	}
	b, err := config.With(b, map[string]any{"tls": files})
	if err != nil {
		return fail(err)
	}
	return b, nil
}

// sysctlPath is below /proc/sys: the dots of a name are slashes, and where it has
// slashes already, its dots are its own.
func sysctlPath(name string) string {
	if strings.Contains(name, "/") {
		return name
	}
	return strings.ReplaceAll(name, ".", "/")
}

// giveAddress sets the first link as the host of a virtual machine says, which knows what its
// own DHCP server would: ADDRESS/LENGTH,GATEWAY,DNS.
func giveAddress(c *uplink.Config, word string) error {
	fields := strings.Split(word, ",")
	if len(fields) != 3 {
		return fmt.Errorf("cannot use cloudos.net=%s: it is ADDRESS/LENGTH,GATEWAY,DNS", word)
	}
	address, err := netip.ParsePrefix(fields[0])
	gateway, gerr := netip.ParseAddr(fields[1])
	dns, derr := netip.ParseAddr(fields[2])
	if err := errors.Join(err, gerr, derr); err != nil {
		return fmt.Errorf("cannot use cloudos.net=%s: %w", word, err)
	}
	c.Links = []uplink.Link{{Name: "eth0", Addresses: []netip.Prefix{address}, Gateway: gateway}}
	if len(c.DNS) == 0 {
		c.DNS = []netip.Addr{dns}
	}
	return nil
}

// connectTo brings the network up as the configuration says, instead of as it was.
func (m *machine) connectTo(ctx context.Context, c uplink.Config) {
	if m.netStop != nil {
		m.netStop()
		<-m.netDone
		m.net.Release()
	}
	n := uplink.New(uplink.Options{Config: c, Hostname: m.hostname(), Resolv: etc + "/resolv.conf", Log: m.log.Printf, Changed: m.change})
	ctx, m.netStop = context.WithCancel(ctx)
	m.netDone = make(chan struct{})
	m.mu.Lock()
	m.net = n
	m.mu.Unlock()
	links := m.come.subscribe()
	go func() {
		defer close(m.netDone)
		n.Run(ctx, links)
	}()
}

func (m *machine) nameHost() {
	name := m.hostname()
	if err := unix.Sethostname([]byte(name)); err != nil {
		m.problem(fmt.Errorf("cannot name the machine %s: %w", name, err))
	}
	for file, text := range map[string]string{
		"hostname": name + "\n",
		"hosts":    "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 " + name + "\n",
	} {
		if err := os.WriteFile(filepath.Join(etc, file), []byte(text), 0o644); err != nil {
			m.problem(err)
		}
	}
}

func dmi(name string) string {
	b, err := os.ReadFile("/sys/class/dmi/id/" + name)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// cidata reads a NoCloud volume: a file system with the label cidata.
func (m *machine) cidata() (user, meta []byte, err error) {
	disks, err := os.ReadDir("/sys/class/block")
	if err != nil {
		return nil, nil, err
	}
	for _, d := range disks {
		kind := volume("/dev/" + d.Name())
		if kind == "" {
			continue
		}
		module := map[string]string{"iso9660": "isofs", "vfat": "vfat"}[kind]
		if err := m.modules.LoadAll(module, "nls_cp437", "nls_iso8859_1", "nls_utf8", "nls_ascii"); err != nil {
			return nil, nil, err
		}
		const at = "/run/cloudos/cidata"
		if err := os.MkdirAll(at, 0o700); err != nil {
			return nil, nil, err
		}
		if err := unix.Mount("/dev/"+d.Name(), at, kind, unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOSUID|unix.MS_NOEXEC, ""); err != nil {
			return nil, nil, fmt.Errorf("cannot mount /dev/%s: %w", d.Name(), err)
		}
		user, err = small(filepath.Join(at, "user-data"))
		if err == nil {
			meta, err = small(filepath.Join(at, "meta-data"))
		}
		if uerr := unix.Unmount(at, unix.MNT_DETACH); err == nil {
			err = uerr
		}
		return user, meta, err
	}
	return nil, nil, nil
}

// small reads a file of a volume; one that is missing is empty.
func small(p string) ([]byte, error) {
	st, err := os.Lstat(p)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > config.MaxSize {
		return nil, fmt.Errorf("%s is no small file", filepath.Base(p))
	}
	return os.ReadFile(p)
}

// volume tells the kind of the file system on a device if its label is cidata.
func volume(dev string) string {
	f, err := os.Open(dev)
	if err != nil {
		return ""
	}
	defer f.Close()
	b := make([]byte, 64)
	if _, err := f.ReadAt(b, 0x8000); err == nil && string(b[1:6]) == "CD001" && strings.EqualFold(strings.TrimSpace(string(b[40:])[:24]), "cidata") {
		return "iso9660"
	}
	head := make([]byte, 512)
	if _, err := f.ReadAt(head, 0); err == nil && head[510] == 0x55 && head[511] == 0xaa {
		for _, at := range []int{0x2b, 0x47} { // FAT12 and 16; FAT32
			kind := string(head[at+11 : at+19])
			if strings.HasPrefix(kind, "FAT") && strings.EqualFold(strings.TrimSpace(string(head[at:at+11])), "cidata") {
				return "vfat"
			}
		}
	}
	return ""
}

// Config is the document in use.
func (m *machine) Config() []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.document) > 0 {
		return config.Redacted(m.document)
	}
	return []byte("version: 1\n")
}

// SetConfig keeps a document on the data disk for the next start.
func (m *machine) SetConfig(b []byte) error {
	// What was shown without its secrets comes back without them.
	kept, err := m.keptConfig()
	if err != nil {
		return err
	}
	m.mu.Lock()
	used := m.document
	m.mu.Unlock()
	if b, err = config.Filled(b, kept, used); err != nil {
		return fault.New(fault.Invalid, "cannot use the configuration: %w", err)
	}
	doc, err := config.Parse(b)
	if err != nil {
		return fault.New(fault.Invalid, "cannot use the configuration: %w", err)
	}
	if doc.Encryption.Passphrase != "" {
		return fault.New(fault.Invalid, "cannot keep a passphrase on the disk that it opens: it belongs into a configuration outside of the disk")
	}
	m.mu.Lock()
	kind := m.dataKind
	m.mu.Unlock()
	if kind != "disk" {
		return fault.New(fault.Conflict, "cannot keep the configuration: this machine has no data disk")
	}
	return durable.WriteFile(configFile, b, 0o600, durable.Everything)
}

// screen is what the console shows.
func (m *machine) screen() string {
	s := m.Status()
	var b bytes.Buffer
	fmt.Fprintf(&b, "CloudOS %s (%s, %s)\n\n  name     %s\n  state    %s\n", s.Version, s.Kernel, s.Arch, s.Hostname, s.State)
	for _, l := range s.Interfaces {
		what := strings.Join(l.Addresses, " ")
		if what == "" {
			what = "no address"
		}
		if l.Problem != "" {
			what += " (" + l.Problem + ")"
		}
		fmt.Fprintf(&b, "  %-8s %s\n", l.Name, what)
	}
	engine := "not running"
	if s.Engine.Ready {
		engine = "answers"
	} else if s.Engine.Running {
		engine = "starts"
	}
	if s.Engine.Restarts > 0 {
		engine += fmt.Sprintf(" (started again %d times, last: %s)", s.Engine.Restarts, s.Engine.LastExit)
	}
	fmt.Fprintf(&b, "  engine   %s\n", engine)
	switch {
	case s.Data.Kind == "disk":
		fmt.Fprintf(&b, "  data     %s\n", s.Data.Device)
	default:
		fmt.Fprintf(&b, "  data     in memory: nothing is kept\n")
	}
	fmt.Fprintf(&b, "  config   %s\n", s.ConfigSource)
	if d := m.debugShellLine(); d != "" {
		fmt.Fprintf(&b, "  debug    %s\n", d)
	}
	if key := m.shownRecovery(); key != "" {
		fmt.Fprintf(&b, "\n  The data were encrypted. Recovery key, shown in this boot alone:\n    %s\n", key)
	}
	for _, p := range s.Problems {
		fmt.Fprintf(&b, "\n  ! %s\n", p)
	}
	if s.State == vmwire.StateSafe {
		b.WriteString("\n  This is safe mode: no engine runs. Correct what is wrong and start the machine again.\n")
		m.mu.Lock()
		at := strings.Join(m.safeAt, " ")
		m.mu.Unlock()
		if at != "" {
			fmt.Fprintf(&b, "  The system's API is served on %s, with the certificates of the last good configuration.\n", at)
		}
	}
	return b.String()
}
