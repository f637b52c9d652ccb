package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Bounds of what is read as configuration.
const (
	maxConfFile    = 1 << 20
	maxConfFiles   = 256
	maxListPlugins = 32
)

// list is a configuration that can be used.
type list struct {
	*libcni.NetworkConfigList
	file string
}

// Network describes a configured network.
type Network struct {
	Name, CNIVersion, File string
	// Plugins are the types of the chain's plugins, in order.
	Plugins []string
	// Capabilities are those that some plugin of the chain takes.
	Capabilities []string
	// Config is the configuration itself.
	Config json.RawMessage
}

// Has tells whether a plugin of the chain takes a capability.
func (n Network) Has(capability string) bool { return slices.Contains(n.Capabilities, capability) }

func (l *list) network() Network {
	n := Network{Name: l.Name, CNIVersion: l.CNIVersion, File: l.file, Config: slices.Clone(json.RawMessage(l.Bytes))}
	for _, p := range l.Plugins {
		n.Plugins = append(n.Plugins, p.Network.Type)
		for c, on := range p.Network.Capabilities {
			if on && !n.Has(c) {
				n.Capabilities = append(n.Capabilities, c)
			}
		}
	}
	slices.Sort(n.Capabilities)
	return n
}

// Networks lists the configured networks in the order of their files' names;
// the first is the default. Of two with one name the first counts.
func (s *Service) Networks() []Network {
	s.confMu.RLock()
	defer s.confMu.RUnlock()
	out := make([]Network, len(s.conf))
	for i, l := range s.conf {
		out[i] = l.network()
	}
	return out
}

// Network finds a configured network, "" the default one.
func (s *Service) Network(name string) (Network, error) {
	l, err := s.pick(name)
	if err != nil {
		return Network{}, err
	}
	return l.network(), nil
}

// Present tells whether there is any configuration, valid or not.
func (s *Service) Present() bool {
	s.confMu.RLock()
	defer s.confMu.RUnlock()
	return len(s.conf) > 0 || s.wrong != nil
}

// ConfDir is the directory of configuration.
func (s *Service) ConfDir() string { return s.cfg.ConfDir }

// Generation grows whenever the configuration has been read anew.
func (s *Service) Generation() uint64 { return s.generation.Load() }

func (s *Service) pick(name string) (*list, error) {
	s.confMu.RLock()
	defer s.confMu.RUnlock()
	for _, l := range s.conf {
		if name == "" || l.Name == name {
			return l, nil
		}
	}
	if name == "" {
		if s.wrong != nil {
			return nil, fault.New(fault.Unavailable, "cannot connect through CNI: there is no valid configuration in %s: %w", s.cfg.ConfDir, s.wrong)
		}
		return nil, fault.New(fault.Unavailable, "cannot connect through CNI: there is no configuration in %s", s.cfg.ConfDir)
	}
	if s.wrong != nil {
		return nil, fault.New(fault.NotFound, "CNI network %s not found in %s, where some files cannot be used: %w", name, s.cfg.ConfDir, s.wrong)
	}
	return nil, fault.New(fault.NotFound, "CNI network %s not found in %s", name, s.cfg.ConfDir)
}

// reload reads the directory anew. Files that cannot be used are left out and
// named in the log; as with other runtimes, the first name in lexical order is
// the default network.
func (s *Service) reload() {
	lists, err := readDir(s.cfg.ConfDir)
	s.confMu.Lock()
	before, was := s.conf, s.wrong
	s.conf, s.wrong = lists, err
	s.confMu.Unlock()
	s.generation.Add(1)
	if err != nil && (was == nil || was.Error() != err.Error()) {
		s.log.Warn("CNI configuration cannot be used", "cause", err)
	}
	if first(before) != first(lists) {
		s.log.Info("the default CNI network changed", "from", first(before), "to", first(lists))
	}
	s.statusMu.Lock()
	clear(s.status)
	s.statusMu.Unlock()
}

func first(ls []*list) string {
	if len(ls) == 0 {
		return ""
	}
	return ls[0].Name
}

// readDir reads a directory of configuration: *.conflist, and *.conf and *.json
// with a single plugin. The error joins what is wrong with the files left out.
func readDir(dir string) (out []*list, errs error) {
	es, err := os.ReadDir(dir) // sorted
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	files := 0
	for _, e := range es {
		ext := filepath.Ext(e.Name())
		if strings.HasPrefix(e.Name(), ".") || ext != ".conflist" && ext != ".conf" && ext != ".json" {
			continue
		}
		if files++; files > maxConfFiles {
			return out, errors.Join(errs, fmt.Errorf("%s has more than %d files; the rest is left out", dir, maxConfFiles))
		}
		l, err := readList(filepath.Join(dir, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			errs = errors.Join(errs, fmt.Errorf("%s: %w", e.Name(), err))
			continue
		}
		out = append(out, l)
	}
	return out, errs
}

func readList(path string) (*list, error) {
	b, err := readBounded(path)
	if err != nil {
		return nil, err
	}
	l, err := parseList(b, filepath.Ext(path) == ".conflist")
	if err != nil {
		return nil, err
	}
	// Spec 1.1: plugins from a folder beside the file that bears the network's
	// name. The name is checked by now: it has no slash.
	if !l.LoadOnlyInlinedPlugins && filepath.Ext(path) == ".conflist" {
		dir := filepath.Join(filepath.Dir(path), l.Name)
		es, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
			return nil, err
		}
		for _, e := range es {
			if filepath.Ext(e.Name()) != ".conf" || strings.HasPrefix(e.Name(), ".") {
				continue
			}
			b, err := readBounded(filepath.Join(dir, e.Name()))
			if err != nil {
				return nil, err
			}
			p, err := libcni.NetworkPluginConfFromBytes(b)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", e.Name(), err)
			}
			l.Plugins = append(l.Plugins, p)
		}
	}
	if err := checkPlugins(l); err != nil {
		return nil, err
	}
	return &list{l, path}, nil
}

// readBounded reads a regular file, or what a symbolic link to one leads to.
func readBounded(path string) ([]byte, error) {
	// Opening a fifo must not wait for its writer.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil {
		return nil, err
	} else if !st.Mode().IsRegular() {
		return nil, errors.New("it is no regular file")
	}
	b, err := io.ReadAll(io.LimitReader(f, maxConfFile+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxConfFile {
		return nil, fmt.Errorf("it is larger than %d bytes", maxConfFile)
	}
	return b, nil
}

// parseList understands a list of plugins, or a single one.
func parseList(b []byte, isList bool) (*libcni.NetworkConfigList, error) {
	if !isList {
		p, err := libcni.NetworkPluginConfFromBytes(b)
		if err != nil {
			return nil, err
		}
		single := map[string]any{"name": p.Network.Name, "cniVersion": p.Network.CNIVersion, "plugins": []json.RawMessage{b}}
		if b, err = json.Marshal(single); err != nil {
			return nil, err
		}
	}
	l, err := libcni.NetworkConfFromBytes(b)
	if err != nil {
		return nil, err
	}
	if !isList {
		l.LoadOnlyInlinedPlugins = true
	}
	if err := utils.ValidateNetworkName(l.Name); err != nil {
		return nil, fmt.Errorf("%s %q", err.Msg, l.Name)
	}
	if l.CNIVersion == "" {
		l.CNIVersion = "0.1.0" // what the spec says about leaving it out
	}
	if !slices.Contains(version.All.SupportedVersions(), l.CNIVersion) {
		return nil, fmt.Errorf("cniVersion %q is not known; the newest is %s", l.CNIVersion, version.Current())
	}
	return l, nil
}

func checkPlugins(l *libcni.NetworkConfigList) error {
	if n := len(l.Plugins); n == 0 || n > maxListPlugins {
		return fmt.Errorf("it has %d plugins; from 1 to %d are possible", n, maxListPlugins)
	}
	for _, p := range l.Plugins {
		t := p.Network.Type
		if strings.ContainsAny(t, "/\x00") || t == "." || t == ".." {
			return fmt.Errorf("%q is no name of a plugin", t)
		}
	}
	return nil
}
