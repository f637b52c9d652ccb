package plan

import (
	"fmt"
	"slices"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/internal/compose/model"
)

// DownOptions of Down.
type DownOptions struct {
	// Services limits it to these and those that depend on them.
	Services      []string
	Volumes       bool
	Images        []string
	RemoveOrphans bool
	NetworksFound []string // keys of networks that exist
	VolumesFound  []string
}

// Down plans the end of a project: containers against the order of dependencies,
// then what they used.
func Down(p *types.Project, o Observed, opt DownOptions) (*Plan, error) {
	var out Plan
	removed, err := backwards(&out, p, o, withDependents(p, opt.Services), func(c *container.Summary) Step {
		return Step{Kind: Remove, Gentle: true}
	})
	if err != nil {
		return nil, err
	}
	known := append(p.ServiceNames(), p.DisabledServiceNames()...)
	for i := range o.Containers {
		c := &o.Containers[i]
		if !opt.RemoveOrphans || !(model.IsOneOff(c) || !slices.Contains(known, model.Service(c))) || len(opt.Services) > 0 {
			continue
		}
		removed = append(removed, out.add(Step{Kind: Remove, Gentle: true, Service: model.Service(c), Name: model.Name(c), Container: c.ID, Why: "orphan"}))
	}
	for _, key := range opt.NetworksFound {
		out.add(Step{Kind: RemoveNetwork, Key: key, Name: p.Networks[key].Name, After: removed})
	}
	for _, img := range opt.Images {
		out.add(Step{Kind: RemoveImage, Name: img, After: removed})
	}
	if opt.Volumes {
		for _, key := range opt.VolumesFound {
			out.add(Step{Kind: RemoveVolume, Key: key, Name: p.Volumes[key].Name, After: removed})
		}
	}
	return &out, nil
}

// withDependents adds those that depend on the services, directly or not.
func withDependents(p *types.Project, services []string) []string {
	out := slices.Clone(services)
	for i := 0; i < len(out); i++ {
		for _, name := range p.ServiceNames() {
			s := p.Services[name]
			if _, ok := s.DependsOn[out[i]]; ok && !slices.Contains(out, name) {
				out = append(out, name)
			}
		}
	}
	return out
}

// Stops plans stops against the order of dependencies.
func Stops(p *types.Project, o Observed, services []string) (*Plan, error) {
	var out Plan
	_, err := backwards(&out, p, o, services, func(c *container.Summary) Step { return Step{Kind: Stop} })
	return &out, err
}

// backwards adds a step for each container of the services, those that depend on
// others first. Containers whose services the project does not know come along
// unless services are named.
func backwards(out *Plan, p *types.Project, o Observed, services []string, step func(*container.Summary) Step) ([]int, error) {
	order, err := Order(p)
	if err != nil {
		return nil, err
	}
	slices.Reverse(order)
	done := map[string][]int{}
	var all []int
	for _, name := range order {
		if len(services) > 0 && !slices.Contains(services, name) {
			continue
		}
		var after []int
		for _, d := range order {
			ds := p.Services[d]
			if _, ok := ds.DependsOn[name]; ok {
				after = append(after, done[d]...)
			}
		}
		slices.Sort(after)
		for i := range o.Containers {
			c := &o.Containers[i]
			if model.Service(c) != name || model.IsOneOff(c) {
				continue
			}
			s := step(c)
			s.Service, s.Number, s.Name, s.Container, s.After = name, model.Number(c), model.Name(c), c.ID, slices.Clone(after)
			done[name] = append(done[name], out.add(s))
		}
		all = append(all, done[name]...)
	}
	return all, nil
}

// RestartOptions of Restarts.
type RestartOptions struct {
	Services []string
	NoDeps   bool
}

// Restarts plans restarts: of the services, and of those that depend on them and
// asked for it.
func Restarts(p *types.Project, o Observed, opt RestartOptions) (*Plan, error) {
	var out Plan
	order, err := Order(p)
	if err != nil {
		return nil, err
	}
	wanted := map[string]bool{}
	for _, s := range opt.Services {
		wanted[s] = true
	}
	done := map[string][]int{}
	for _, name := range order {
		s := p.Services[name]
		var after []int
		for d, c := range s.DependsOn {
			if !c.Restart || opt.NoDeps {
				continue
			}
			if len(opt.Services) > 0 && wanted[d] {
				wanted[name] = true
			}
			if len(done[d]) == 0 {
				continue
			}
			if c.Condition != "" && c.Condition != types.ServiceConditionStarted {
				after = append(after, out.add(Step{Kind: Wait, Service: d, Dependent: name, Condition: c.Condition, Optional: !c.Required, After: slices.Clone(done[d])}))
			}
			after = append(after, done[d]...)
		}
		if len(opt.Services) > 0 && !wanted[name] {
			continue
		}
		slices.Sort(after)
		for i := range o.Containers {
			c := &o.Containers[i]
			if model.Service(c) == name && !model.IsOneOff(c) {
				done[name] = append(done[name], out.add(Step{Kind: Restart, Service: name, Number: model.Number(c), Name: model.Name(c), Container: c.ID, After: slices.Clone(after)}))
			}
		}
	}
	return &out, nil
}

// Each plans the same for every container that passes, in no order.
func Each(kind Kind, list []container.Summary, pass func(*container.Summary) bool) *Plan {
	var out Plan
	for i := range list {
		c := &list[i]
		if pass(c) {
			out.add(Step{Kind: kind, Service: model.Service(c), Number: model.Number(c), Name: model.Name(c), Container: c.ID})
		}
	}
	return &out
}

// CheckServices refuses names that no service has.
func CheckServices(p *types.Project, services []string) error {
	for _, s := range services {
		if _, ok := p.Services[s]; ok {
			continue
		}
		if _, ok := p.DisabledServices[s]; ok {
			continue
		}
		return fmt.Errorf("no such service: %s", s)
	}
	return nil
}
