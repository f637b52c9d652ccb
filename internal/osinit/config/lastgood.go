package config

import (
	"net/url"
	"strings"

	"go.yaml.in/yaml/v3"

	engine "github.com/cloudos-io/cloudos/internal/config"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// Access is how a document lets operators reach a machine over the network.
type Access struct {
	// Listen are addresses as net.Listen takes them.
	Listen []string
	// Files are those of the engine's section tls; a document's own section comes before them.
	Files engine.TLS
	// Judged says that who is let in may not do everything: by a policy, or because everything has to be recorded.
	Judged bool
}

// LastGood reads of a document what a machine that cannot use its own needs, to be reached and told another: its name,
// network and clock, and its Access. The document was used once, but perhaps by another version of the system: what
// this one does not know is left out, and what it does is checked like any other's.
func LastGood(b []byte) (*Document, Access, error) {
	none := func(err error) (*Document, Access, error) {
		return nil, Access{}, fault.New(fault.Invalid, "cannot use the last good configuration: %w", err)
	}
	if len(b) > MaxSize {
		return none(fault.New(fault.Invalid, "it is larger than %d bytes", MaxSize))
	}
	var all struct {
		Version  int       `yaml:"version"`
		Hostname string    `yaml:"hostname"`
		Network  yaml.Node `yaml:"network"`
		Time     Time      `yaml:"time"`
		TLS      TLS       `yaml:"tls"`
		Engine   struct {
			Listen []string   `yaml:"listen"`
			TLS    engine.TLS `yaml:"tls"`
			Policy string     `yaml:"policy"`
			Audit  struct {
				Required bool `yaml:"required"`
			} `yaml:"audit"`
		} `yaml:"engine"`
	}
	if err := yaml.Unmarshal(b, &all); err != nil {
		return none(err)
	}
	d := &Document{Version: all.Version, Hostname: all.Hostname, Time: all.Time, TLS: all.TLS}
	if !all.Network.IsZero() {
		if err := all.Network.Decode(&d.Network); err != nil {
			return none(err)
		}
	}
	if err := d.check(); err != nil {
		return none(err)
	}
	a := Access{Files: all.Engine.TLS, Judged: all.Engine.Policy != "" || all.Engine.Audit.Required}
	for _, l := range all.Engine.Listen {
		if u, err := url.Parse(l); err == nil && u.Scheme == "tcp" && u.Host != "" && strings.Contains(u.Host, ":") {
			a.Listen = append(a.Listen, u.Host)
		}
	}
	return d, a, nil
}
