package model

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/moby/moby/api/types/container"
)

// Service tells which service a container belongs to.
func Service(c *container.Summary) string { return c.Labels[LabelService] }

// Number is a container's number in its service, 0 when it has none.
func Number(c *container.Summary) int {
	n, _ := strconv.Atoi(c.Labels[LabelNumber])
	return n
}

// IsOneOff tells whether a container was made by "run".
func IsOneOff(c *container.Summary) bool { return c.Labels[LabelOneOff] == "True" }

// Name is a container's own name, without the slash.
func Name(c *container.Summary) string {
	// Names with more than one slash are links'.
	for _, n := range c.Names {
		if strings.LastIndexByte(n, '/') == 0 {
			return n[1:]
		}
	}
	if len(c.Names) > 0 {
		return strings.TrimPrefix(c.Names[0], "/")
	}
	return c.ID[:min(12, len(c.ID))]
}

// ShortName leaves out the project where the name is the one we give.
func ShortName(c *container.Summary) string {
	name := Name(c)
	for _, sep := range []string{"-", "_"} {
		if rest, ok := strings.CutPrefix(name, c.Labels[LabelProject]+sep); ok && rest == Service(c)+sep+c.Labels[LabelNumber] {
			return rest
		}
	}
	return name
}

// FromContainers makes up a project from the labels of its containers, for
// commands that are given a name alone.
func FromContainers(name string, list []container.Summary, services ...string) (*types.Project, error) {
	p := &types.Project{Name: name, Services: types.Services{}, Networks: types.Networks{}, Volumes: types.Volumes{}}
	for i := range list {
		c := &list[i]
		if IsOneOff(c) {
			continue
		}
		sn := Service(c)
		s, ok := p.Services[sn]
		if !ok {
			s = types.ServiceConfig{Name: sn, ContainerSpec: types.ContainerSpec{Image: c.Image, Labels: c.Labels}, WorkloadSpec: types.WorkloadSpec{DependsOn: dependencies(c.Labels[LabelDependsOn])}}
		}
		if s.Scale == nil {
			s.Scale = new(int)
		}
		*s.Scale++
		p.Services[sn] = s
		if p.WorkingDir == "" {
			p.WorkingDir = c.Labels[LabelWorkingDir]
		}
	}
	for n, s := range p.Services {
		for d := range s.DependsOn {
			if _, ok := p.Services[d]; !ok {
				delete(s.DependsOn, d)
			}
		}
		p.Services[n] = s
	}
	for _, s := range services {
		if _, ok := p.Services[s]; !ok {
			return nil, fmt.Errorf("no such service: %s", s)
		}
	}
	return p, nil
}

// dependencies reads the label that lists them: name:condition:restart,…
func dependencies(label string) types.DependsOnConfig {
	out := types.DependsOnConfig{}
	for _, e := range split(label) {
		name, rest, _ := strings.Cut(e, ":")
		cond, restart, _ := strings.Cut(rest, ":")
		if cond == "" {
			cond = types.ServiceConditionStarted
		}
		if name != "" {
			out[name] = types.ServiceDependency{Condition: cond, Restart: restart == "true"}
		}
	}
	return out
}

// DependsOnLabel writes that label.
func DependsOnLabel(d types.DependsOnConfig) string {
	out := make([]string, 0, len(d))
	for name, c := range d {
		out = append(out, fmt.Sprintf("%s:%s:%t", name, c.Condition, c.Restart))
	}
	slices.Sort(out)
	return strings.Join(out, ",")
}
