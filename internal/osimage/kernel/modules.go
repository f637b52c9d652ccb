package kernel

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
)

// Module is a kernel module with what it says of itself.
type Module struct {
	// Name with underscores, as the kernel lists it; Path below lib/modules/VERSION.
	Name, Path string
	Data       []byte
	Depends    []string
	Aliases    []string
	// Soft are modules to load before it, if they are there.
	Soft []string
	// Firmware are files that it may ask for.
	Firmware []string
}

// canonical turns dashes into underscores, as the kernel does.
func canonical(name string) string { return strings.ReplaceAll(name, "-", "_") }

// parseModule reads a module's .modinfo section.
func parseModule(p string, data []byte) (*Module, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("cannot read the module %s: %w", p, err)
	}
	s := f.Section(".modinfo")
	if s == nil {
		return nil, fmt.Errorf("the module %s has no .modinfo section", p)
	}
	info, err := s.Data()
	if err != nil {
		return nil, fmt.Errorf("cannot read the module %s: %w", p, err)
	}
	m := &Module{Name: canonical(strings.TrimSuffix(path.Base(p), ".ko")), Path: p, Data: data}
	for _, field := range strings.Split(string(info), "\x00") {
		key, value, _ := strings.Cut(field, "=")
		switch key {
		case "depends":
			for _, d := range strings.Split(value, ",") {
				if d != "" {
					m.Depends = append(m.Depends, canonical(d))
				}
			}
		case "alias":
			m.Aliases = append(m.Aliases, value)
		case "softdep":
			if pre, ok := strings.CutPrefix(value, "pre: "); ok {
				pre, _, _ = strings.Cut(pre, " post:")
				for _, d := range strings.Fields(pre) {
					m.Soft = append(m.Soft, canonical(d))
				}
			}
		case "firmware":
			m.Firmware = append(m.Firmware, value)
		}
	}
	return m, nil
}

// Pick returns the modules with these names and all that they depend on, sorted
// by path. Names may be patterns (path.Match) of names or, with a slash, of paths.
// A plain name that is neither a module nor built into the kernel is an error.
func (k *Kernel) Pick(patterns ...string) ([]*Module, error) {
	chosen := map[string]*Module{}
	var add func(m *Module)
	add = func(m *Module) {
		if chosen[m.Name] != nil {
			return
		}
		chosen[m.Name] = m
		for _, d := range slices.Concat(m.Depends, m.Soft) {
			if dep := k.Modules[d]; dep != nil {
				add(dep)
			}
		}
	}
	for _, p := range patterns {
		found := k.Builtin[canonical(p)]
		for _, m := range k.Modules {
			subject, pattern := m.Name, canonical(p)
			if strings.Contains(p, "/") {
				subject, pattern = m.Path, p
			}
			if ok, err := path.Match(pattern, subject); err != nil {
				return nil, fmt.Errorf("cannot read the pattern %q: %w", p, err)
			} else if ok {
				add(m)
				found = true
			}
		}
		if !found && !strings.ContainsAny(p, "*?[/") {
			return nil, fmt.Errorf("the kernel %s has no module %s", k.Version, p)
		}
	}
	var out []*Module
	for _, m := range chosen {
		out = append(out, m)
	}
	slices.SortFunc(out, func(a, b *Module) int { return strings.Compare(a.Path, b.Path) })
	return out, nil
}

// Index describes modules for who loads them (package osinit/modules): a line
// "m NAME PATH DEPENDENCIES", and "a PATTERN NAME" for each alias. Dependencies come in the
// order in which they are to be loaded.
func Index(w io.Writer, picked []*Module) error {
	by := map[string]*Module{}
	for _, m := range picked {
		by[m.Name] = m
	}
	var b bytes.Buffer
	for _, m := range picked {
		fmt.Fprintf(&b, "m %s %s %s\n", m.Name, m.Path, strings.Join(order(by, m), ","))
	}
	for _, m := range picked {
		for _, a := range m.Aliases {
			if !strings.ContainsAny(a, " \n") {
				fmt.Fprintf(&b, "a %s %s\n", a, m.Name)
			}
		}
	}
	_, err := w.Write(b.Bytes())
	return err
}

// Chain lists the paths of modules and of what they need, each behind what it needs itself.
func Chain(picked []*Module, names ...string) []string {
	by := map[string]*Module{}
	for _, m := range picked {
		by[m.Name] = m
	}
	var out []string
	for _, n := range names {
		m := by[n]
		if m == nil {
			continue // it is part of the kernel
		}
		for _, d := range append(order(by, m), n) {
			if p := by[d].Path; !slices.Contains(out, p) {
				out = append(out, p)
			}
		}
	}
	return out
}

// order lists what m needs, each before what needs it.
func order(by map[string]*Module, m *Module) []string {
	var out []string
	seen := map[string]bool{m.Name: true}
	var visit func(m *Module)
	visit = func(m *Module) {
		for _, d := range slices.Concat(m.Soft, m.Depends) {
			if dep := by[d]; dep != nil && !seen[d] {
				seen[d] = true
				visit(dep)
				out = append(out, d)
			}
		}
	}
	visit(m)
	return out
}
