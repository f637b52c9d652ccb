// Package modules loads kernel modules from an image: by name, with what they
// need, and for the devices that the kernel found. The builder of images writes
// the index that it reads, lib/modules/VERSION/cloudos.index: a line "m NAME PATH
// DEPENDENCIES" for each module, "a PATTERN NAME" for each alias. The first process
// imports it, and the program that the kernel asks for modules (cloudos-modprobe).
package modules

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Set is the modules of a folder.
type Set struct {
	dir *os.Root // stays reachable when the root changes
	// list reads the index when it is first asked for.
	list func() (*list, error)
}

type list struct {
	modules map[string]*module
	aliases []alias
}

type module struct {
	path    string
	depends []string
	once    sync.Once
	err     error
}

type alias struct{ pattern, name string }

// index is the file that lists a folder's modules.
const index = "cloudos.index"

// Open opens the modules of the running kernel below root.
func Open(root string) (*Set, error) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return nil, err
	}
	dir, err := os.OpenRoot(filepath.Join(root, "lib/modules", unix.ByteSliceToString(uts.Release[:])))
	if err == nil {
		_, err = dir.Stat(index)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read the list of modules: %w", err)
	}
	return newSet(dir, func() ([]byte, error) { return dir.ReadFile(index) }), nil
}

// None is a set with no modules, for a kernel that somebody else provides for.
func None() *Set { return newSet(nil, func() ([]byte, error) { return nil, nil }) }

func newSet(dir *os.Root, read func() ([]byte, error)) *Set {
	return &Set{dir: dir, list: sync.OnceValues(func() (*list, error) {
		b, err := read()
		if err != nil {
			return nil, fmt.Errorf("cannot read the list of modules: %w", err)
		}
		return parse(b)
	})}
}

// find returns a module; nil where there is none of the name.
func (s *Set) find(name string) (*module, error) {
	l, err := s.list()
	if err != nil {
		return nil, err
	}
	return l.modules[canonical(name)], nil
}

// Close lets go of the folder: nothing can be loaded from it any more.
func (s *Set) Close() error { return s.dir.Close() }

func parse(b []byte) (*list, error) {
	s := &list{modules: map[string]*module{}}
	for line := range bytes.Lines(b) {
		f := strings.Split(strings.TrimSuffix(string(line), "\n"), " ")
		switch {
		case len(f) == 4 && f[0] == "m" && fs.ValidPath(f[2]):
			m := &module{path: f[2]}
			if f[3] != "" {
				m.depends = strings.Split(f[3], ",")
			}
			s.modules[f[1]] = m
		case len(f) == 3 && f[0] == "a":
			s.aliases = append(s.aliases, alias{f[1], f[2]})
		default:
			return nil, fmt.Errorf("cannot read the list of modules: %q", line)
		}
	}
	return s, nil
}

// Has reports whether there is a module of the name.
func (s *Set) Has(name string) bool {
	m, err := s.find(name)
	return err == nil && m != nil
}

func canonical(name string) string { return strings.ReplaceAll(name, "-", "_") }

// parameters keep modules from making links by themselves: the bond0 that bonding makes has a mode that nobody
// asked for, and its name is taken then.
var parameters = map[string]string{"bonding": "max_bonds=0", "dummy": "numdummies=0", "ifb": "numifbs=0"}

// Load loads a module after those that it needs. One that is loaded already, or
// that is not here (it may be part of the kernel), is none of its errors.
func (s *Set) Load(name string) error {
	m, err := s.find(name)
	if err != nil || m == nil {
		return err
	}
	for _, d := range m.depends {
		if err := s.insert(d); err != nil {
			return err
		}
	}
	return s.insert(canonical(name))
}

// LoadAll loads several at a time.
func (s *Set) LoadAll(names ...string) error {
	errs := make([]error, len(names))
	var wg sync.WaitGroup
	for i, n := range names {
		wg.Go(func() { errs[i] = s.Load(n) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (s *Set) insert(name string) error {
	m, err := s.find(name)
	if err != nil || m == nil {
		return err
	}
	m.once.Do(func() {
		if loaded(name) {
			return
		}
		f, err := s.dir.Open(m.path)
		if err != nil {
			m.err = err
			return
		}
		defer f.Close()
		if err := unix.FinitModule(int(f.Fd()), parameters[name], 0); err != nil && !errors.Is(err, unix.EEXIST) {
			m.err = fmt.Errorf("cannot load the module %s: %w", name, err)
		}
	})
	return m.err
}

// loaded tells whether a module is live: one that is still coming counts as not,
// so that whoever needs it waits in the kernel.
func loaded(name string) bool {
	b, err := os.ReadFile("/sys/module/" + name + "/initstate")
	return err == nil && string(b) == "live\n"
}

// Match returns the names of the modules with an alias that matches, in the
// index's order; a module's own name matches, too.
func (s *Set) Match(modalias string) []string {
	l, err := s.list()
	if err != nil {
		return nil // it is told where one is loaded
	}
	if l.modules[canonical(modalias)] != nil {
		return []string{canonical(modalias)}
	}
	var out []string
	for _, a := range l.aliases {
		if match(a.pattern, modalias) {
			out = append(out, a.name)
		}
	}
	return out
}

// match is fnmatch without special treatment of slashes, as modprobe has it.
func match(pattern, s string) bool {
	for pattern != "" {
		switch pattern[0] {
		case '*':
			for pattern != "" && pattern[0] == '*' {
				pattern = pattern[1:]
			}
			if pattern == "" {
				return true
			}
			for i := range len(s) {
				if match(pattern, s[i:]) {
					return true
				}
			}
			return false
		case '[':
			end := strings.IndexByte(pattern, ']')
			if end < 0 || s == "" || !within(pattern[1:end], s[0]) {
				return false
			}
			pattern, s = pattern[end+1:], s[1:]
		default:
			if s == "" || pattern[0] != '?' && pattern[0] != s[0] {
				return false
			}
			pattern, s = pattern[1:], s[1:]
		}
	}
	return s == ""
}

func within(set string, c byte) bool {
	for i := 0; i < len(set); i++ {
		if i+2 < len(set) && set[i+1] == '-' {
			if set[i] <= c && c <= set[i+2] {
				return true
			}
			i += 2
		} else if set[i] == c {
			return true
		}
	}
	return false
}

// Devices loads the modules for all devices that the kernel has found and that
// wait for one, once more for what those bring.
func (s *Set) Devices() error {
	var errs []error
	seen := map[string]bool{}
	for range 4 {
		found := false
		filepath.WalkDir("/sys/devices", func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.Name() == "modalias" {
				if b, err := os.ReadFile(p); err == nil {
					m := strings.TrimSpace(string(b))
					if m != "" && !seen[m] {
						seen[m], found = true, true
						errs = append(errs, s.Device(m))
					}
				}
			}
			return nil
		})
		if !found {
			break
		}
	}
	return errors.Join(errs...)
}

// Device loads the modules for one device.
func (s *Set) Device(modalias string) error {
	var errs []error
	for _, name := range s.Match(modalias) {
		// A driver that does not want the device after all says so by an error.
		if err := s.Load(name); err != nil && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
