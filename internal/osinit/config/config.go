// Package config is the machine's configuration: one versioned YAML (or JSON)
// document, strictly decoded. Package source finds it; the first process and the
// builder of images read it. docs/cloudos-config.md is its guide.
package config

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"
	"unicode"

	"go.yaml.in/yaml/v3"

	engine "github.com/cloudos-io/cloudos/internal/config"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/osinit/uplink"
	"github.com/cloudos-io/cloudos/internal/pattern"
)

// Version is the version of the document that this build reads.
const Version = 1

// MaxSize bounds a document, in bytes.
const MaxSize = 1 << 20

// InImage is where an image carries a document.
const InImage = "/etc/cloudos/config.yaml"

// Document is the configuration. Zero values mean the default given with each field.
type Document struct {
	// Version must be 1.
	Version int `yaml:"version"`
	// Hostname is the machine's name (default: what the cloud says, else cloudos).
	Hostname string `yaml:"hostname"`
	// Role is standalone (default): the engine alone; master and node are kept for
	// clusters, and run the engine alone so far.
	Role string `yaml:"role"`
	// Join says which cluster a node joins.
	Join    *Join         `yaml:"join"`
	Network uplink.Config `yaml:"network"`
	Time    Time          `yaml:"time"`
	// Engine is the engine's own document (docs/configuration.md), without its version.
	Engine yaml.Node `yaml:"engine"`
	// TLS is of the engine's listeners.
	TLS TLS `yaml:"tls"`
	// Trust holds certificates of further authorities, PEM.
	Trust []string `yaml:"trust"`
	// Modules are kernel modules to load; Sysctl are kernel settings by dotted name.
	Modules []string          `yaml:"modules"`
	Sysctl  map[string]string `yaml:"sysctl"`
	// Install puts the system on a disk.
	Install *Install `yaml:"install"`
	// Encryption is of what is kept.
	Encryption Encryption `yaml:"encryption"`

	// DebugShell switches the shell for emergencies on (docs/cloudos-debug.md).
	DebugShell DebugShell `yaml:"debugShell"`

	engine []byte
}

// DebugShell says from each start on who may open a shell on the machine.
type DebugShell struct {
	// On lets whoever may use the engine's API open one.
	On bool `yaml:"on"`
	// For bounds it from the machine's start on, as Go writes durations; Until by the clock. With
	// neither it stays on until the machine stops.
	For   time.Duration `yaml:"for"`
	Until time.Time     `yaml:"until"`
	// Reason is recorded.
	Reason string `yaml:"reason"`
}

// Time says how the clock is kept.
type Time struct {
	// Servers are NTP servers (default: those of DHCP, then public ones).
	Servers []string `yaml:"servers"`
	// Off leaves the clock alone.
	Off bool `yaml:"off"`
}

var (
	hostname = pattern.New(`^[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?(\.[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?)*$`)
	linkName = pattern.New(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,14}$`)
	module   = pattern.New(`^[a-zA-Z0-9_-]{1,64}$`)
	sysctl   = pattern.New(`^[a-z0-9_]+([./][a-zA-Z0-9_-]+)+$`)
	server   = pattern.New(`^[a-zA-Z0-9.:-]{1,253}$`)
	bondMode = []string{"", "active-backup", "802.3ad", "balance-rr", "balance-xor", "broadcast", "balance-tlb", "balance-alb"}
)

// Parse decodes and checks a document.
func Parse(b []byte) (*Document, error) {
	if len(b) > MaxSize {
		return nil, fault.New(fault.Invalid, "the document is larger than %d bytes", MaxSize)
	}
	dec := yaml.NewDecoder(bytes.NewReader(b))
	dec.KnownFields(true)
	d := new(Document)
	if err := dec.Decode(d); err != nil {
		if errors.Is(err, io.EOF) {
			return nil, fault.New(fault.Invalid, "the document is empty")
		}
		return nil, fault.As(fault.Invalid, err)
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, fault.New(fault.Invalid, "there must be one document only")
	}
	return d, d.check()
}

func (d *Document) check() error {
	bad := func(format string, args ...any) error { return fault.New(fault.Invalid, format, args...) }
	if d.Version != Version {
		return bad("version is %d; this system reads version %d (the first line must be \"version: %d\")", d.Version, Version, Version)
	}
	if d.Hostname != "" && !IsHostname(d.Hostname) {
		return bad("hostname %q is no host's name", d.Hostname)
	}
	if !slices.Contains(roles, d.Role) {
		return bad("role %q is not known: it is standalone, master or node", d.Role)
	}
	if err := d.checkInstall(); err != nil {
		return err
	}
	for _, s := range d.Time.Servers {
		if !server.MatchString(s) {
			return bad("time.servers: %q is no server", s)
		}
	}
	for _, m := range d.Modules {
		if !module.MatchString(m) {
			return bad("modules: %q is no module", m)
		}
	}
	for k, v := range d.Sysctl {
		if !sysctl.MatchString(k) || strings.ContainsAny(v, "\n\x00") {
			return bad("sysctl: %q is no kernel setting", k)
		}
	}
	for i, t := range d.Trust {
		for rest, n := []byte(t), 0; ; n++ {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil {
				if n == 0 || len(bytes.TrimSpace(rest)) > 0 {
					return bad("trust: entry %d is no PEM certificate", i+1)
				}
				break
			}
			if _, err := x509.ParseCertificate(block.Bytes); err != nil {
				return bad("trust: entry %d: %w", i+1, err)
			}
		}
	}
	if s := d.DebugShell; !s.On && s != (DebugShell{}) || s.For < 0 || s.For > 0 && !s.Until.IsZero() || len(s.Reason) > 200 || strings.ContainsFunc(s.Reason, unicode.IsControl) {
		return bad("debugShell: it is on: true, and for: a duration such as 2h, or until: a time such as 2030-01-31T12:00:00Z, and a reason of one line")
	}
	if err := d.links(); err != nil {
		return err
	}
	if err := d.Encryption.check(); err != nil {
		return err
	}
	if err := d.TLS.check(&d.Engine); err != nil {
		return err
	}
	return d.checkEngine()
}

func (d *Document) links() error {
	bad := func(format string, args ...any) error { return fault.New(fault.Invalid, "network: "+format, args...) }
	seen := map[string]bool{}
	for i, l := range d.Network.Links {
		id := l.Name
		if id == "" {
			id = strings.ToLower(l.MAC)
		}
		switch {
		case id == "":
			return bad("link %d has neither name nor mac", i+1)
		case seen[id]:
			return bad("link %s is there twice", id)
		case l.Name != "" && !linkName.MatchString(l.Name):
			return bad("%q is no link's name", l.Name)
		case l.VLAN != nil && l.Bond != nil:
			return bad("link %s cannot be a VLAN and a bond", id)
		case l.VLAN != nil && (l.Name == "" || !linkName.MatchString(l.VLAN.Parent) || l.VLAN.ID < 1 || l.VLAN.ID > 4094):
			return bad("VLAN %s needs a name, a parent and an id from 1 to 4094", id)
		case l.MTU != 0 && (l.MTU < 576 || l.MTU > 65535):
			return bad("link %s: an MTU of %d is not possible", id, l.MTU)
		}
		seen[id] = true
		if b := l.Bond; b != nil {
			ok := false
			for _, m := range bondMode {
				ok = ok || b.Mode == m
			}
			if l.Name == "" || !ok || len(b.Members) == 0 {
				return bad("bond %s needs a name, members, and a mode that the kernel knows", id)
			}
			for _, m := range b.Members {
				if !linkName.MatchString(m) {
					return bad("bond %s: %q is no link's name", id, m)
				}
			}
		}
		for _, a := range l.Addresses {
			if !a.IsValid() || a.Addr().IsUnspecified() {
				return bad("link %s: %q is no address with a prefix length", id, a)
			}
		}
		for _, r := range l.Routes {
			if !r.To.IsValid() || r.Via.IsValid() && r.Via.Is4() != r.To.Addr().Is4() {
				return bad("link %s: a route needs to and, of the same family, via", id)
			}
		}
	}
	for _, s := range d.Network.DNS {
		if s == (netip.Addr{}) || s.Zone() != "" {
			return bad("dns: %q is no address", s)
		}
	}
	return nil
}

// checkEngine makes the engine's document and reads it as the engine does.
func (d *Document) checkEngine() error {
	if d.Engine.IsZero() {
		return nil
	}
	if d.Engine.Kind != yaml.MappingNode {
		return fault.New(fault.Invalid, "engine must be a mapping")
	}
	n := d.Engine
	has := false
	for i := 0; i+1 < len(n.Content); i += 2 {
		has = has || n.Content[i].Value == "version"
	}
	if !has {
		n.Content = append([]*yaml.Node{{Kind: yaml.ScalarNode, Value: "version"}, {Kind: yaml.ScalarNode, Tag: "!!int", Value: "1"}}, n.Content...)
	}
	b, err := yaml.Marshal(&n)
	if err != nil {
		return fault.New(fault.Invalid, "engine: %w", err)
	}
	c, err := engine.Parse(b)
	if err != nil {
		return fault.New(fault.Invalid, "engine: %w", err)
	}
	if c.Root != "" || c.RunRoot != "" {
		return fault.New(fault.Invalid, "engine: root and runRoot are the system's to choose")
	}
	d.engine = b
	return nil
}

// EngineDocument is the engine's configuration, or nothing.
func (d *Document) EngineDocument() []byte { return d.engine }

// EngineListens are the listeners that the engine's document names.
func (d *Document) EngineListens() []string {
	var c struct {
		Listen []string `yaml:"listen"`
	}
	if yaml.Unmarshal(d.engine, &c) != nil {
		return nil
	}
	return c.Listen
}

// IsHostname reports whether s can be a machine's name.
func IsHostname(s string) bool { return len(s) <= 64 && hostname.MatchString(s) }
