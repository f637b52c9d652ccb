package plan

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/internal/compose/model"
)

// UpOptions of Up.
type UpOptions struct {
	// Services are those that were asked for; none means all. The others of the
	// project are there because these depend on them.
	Services  []string
	Separator string
	// Recreate is for the services asked for, RecreateDeps for the others.
	Recreate, RecreateDeps Policy
	RemoveOrphans          bool
	IgnoreOrphans          bool
	// RecreateVolumes lists keys of volumes whose loss was agreed to.
	RecreateVolumes []string
	// NoStart leaves out everything that starts.
	NoStart bool
	// Barrier has all containers made before the first starts, so that somebody
	// can attach to them.
	Barrier bool
	// Wait waits for every service in the end, until it runs, is healthy or has
	// completed.
	Wait bool
	// Only starts what is there (with NoCreate nothing is made).
	NoCreate bool
}

// RunningOrHealthy is the condition of a service that Wait waits for.
const RunningOrHealthy = "running_or_healthy"

// up holds what is known while a plan is made.
type up struct {
	Plan
	p   *types.Project
	o   Observed
	opt UpOptions
	// Steps that later ones depend on: what makes networks and volumes, what
	// makes a service's containers, what starts them.
	networks, volumes map[string][]int
	made, started     map[string][]int
	// fresh networks and volumes have no id yet: containers on them are made anew.
	fresh, freshVolumes map[string]bool
	// remade lists services whose first container changes.
	remade  map[string]bool
	byName  map[string][]container.Summary
	stopped map[string][]int // container id → the steps that stop it
	rejoin  map[string][]int // container id → the steps that put it on networks made anew
	// cleared lists, by service, the steps that remove leftovers: their names are
	// taken until then.
	cleared map[string][]int
	starts  []pending
	barrier int
}

// pending is a container that is to be started.
type pending struct {
	service string
	step    Step
}

// Up plans what makes a project run.
func Up(p *types.Project, o Observed, opt UpOptions) (*Plan, error) {
	u := &up{p: p, o: o, opt: opt, networks: map[string][]int{}, volumes: map[string][]int{}, made: map[string][]int{}, started: map[string][]int{},
		fresh: map[string]bool{}, freshVolumes: map[string]bool{}, remade: map[string]bool{}, byName: map[string][]container.Summary{}, stopped: map[string][]int{}, rejoin: map[string][]int{}, cleared: map[string][]int{}, barrier: -1}
	order, err := Order(p)
	if err != nil {
		return nil, err
	}
	u.leftovers()
	for i := range u.o.Containers {
		if c := &u.o.Containers[i]; !model.IsOneOff(c) {
			u.byName[model.Service(c)] = append(u.byName[model.Service(c)], *c)
		}
	}
	if !opt.NoCreate {
		u.orphans()
		if err := u.planNetworks(); err != nil {
			return nil, err
		}
		if err := u.planVolumes(); err != nil {
			return nil, err
		}
	}
	for _, name := range order {
		if err := u.service(name); err != nil {
			return nil, err
		}
	}
	if opt.NoStart {
		return &u.Plan, nil
	}
	if opt.Barrier {
		s := Step{Kind: Barrier}
		for i := range u.Steps {
			s.After = append(s.After, i)
		}
		u.barrier = u.add(s)
	}
	for _, name := range order {
		u.start(name)
	}
	if opt.Wait {
		u.waitAll(order)
	}
	return &u.Plan, nil
}

// Order lists services so that each comes after those that it depends on, by
// name where that leaves a choice.
func Order(p *types.Project) ([]string, error) {
	var out []string
	state := map[string]int{} // 1 being visited, 2 done
	var visit func(name string, path []string) error
	visit = func(name string, path []string) error {
		switch state[name] {
		case 2:
			return nil
		case 1:
			return fmt.Errorf("services depend on each other: %s", strings.Join(append(path, name), " -> "))
		}
		state[name] = 1
		s := p.Services[name]
		for _, d := range slices.Sorted(maps.Keys(s.DependsOn)) {
			if _, ok := p.Services[d]; ok {
				if err := visit(d, append(path, name)); err != nil {
					return err
				}
			}
		}
		state[name] = 2
		out = append(out, name)
		return nil
	}
	for _, n := range p.ServiceNames() {
		if err := visit(n, nil); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// leftovers deals with replacements that were cut off: a container whose name
// still holds the id of the one it was to replace.
func (u *up) leftovers() {
	var kept []container.Summary
	for _, c := range u.o.Containers {
		old, name, ok := strings.Cut(model.Name(&c), "_")
		if c.Labels[model.LabelReplace] == "" || !ok || !isShortID(old) {
			kept = append(kept, c)
			continue
		}
		if slices.ContainsFunc(u.o.Containers, func(x container.Summary) bool { return strings.HasPrefix(x.ID, old) }) {
			id := u.add(Step{Kind: Remove, Service: model.Service(&c), Name: model.Name(&c), Container: c.ID, Why: "left over from a replacement that was cut off"})
			u.cleared[model.Service(&c)] = append(u.cleared[model.Service(&c)], id)
			continue
		}
		id := u.add(Step{Kind: Rename, Service: model.Service(&c), Number: model.Number(&c), Name: name, Container: c.ID, Why: "its replacement was cut off"})
		u.made[model.Service(&c)] = append(u.made[model.Service(&c)], id)
		c.Names = []string{"/" + name}
		kept = append(kept, c)
	}
	u.o.Containers = kept
}

func isShortID(s string) bool {
	return len(s) == 12 && strings.Trim(s, "0123456789abcdef") == ""
}

func (u *up) orphans() {
	known := append(u.p.ServiceNames(), u.p.DisabledServiceNames()...)
	for i := range u.o.Containers {
		c := &u.o.Containers[i]
		orphan := !slices.Contains(known, model.Service(c))
		if model.IsOneOff(c) {
			orphan = c.State == container.StateExited || c.State == container.StateDead
		}
		switch {
		case !orphan:
		case u.opt.RemoveOrphans:
			u.add(Step{Kind: Remove, Service: model.Service(c), Name: model.Name(c), Container: c.ID, Gentle: true, Why: "its service is not in the project any more"})
		case !u.opt.IgnoreOrphans:
			u.Orphans = append(u.Orphans, model.Name(c))
		}
	}
}

func (u *up) planNetworks() error {
	for _, key := range u.p.NetworkNames() {
		n := u.p.Networks[key]
		found, ok := u.o.Networks[key]
		switch {
		case bool(n.External) && !ok:
			return fmt.Errorf("network %s declared as external, but could not be found: make it with 'servin networks create %s'", n.Name, n.Name)
		case bool(n.External):
			continue
		case !ok:
			u.fresh[key] = true
			u.networks[key] = []int{u.add(Step{Kind: CreateNetwork, Key: key, Name: n.Name})}
			continue
		}
		if w := foreign("network", n.Name, found.Labels, u.p.Name); w != "" {
			u.Warnings = append(u.Warnings, w)
		}
		if l, ok := found.Labels[model.LabelNetwork]; ok && l != key {
			return fmt.Errorf("network %s belongs to %q of a Compose file, not to %q", n.Name, l, key)
		}
		h, err := model.NetworkHash(n)
		if err != nil {
			return err
		}
		if l := found.Labels[model.LabelHash]; l == "" || l == h {
			continue
		}
		// Made anew: whoever is on it leaves first.
		var gone []int
		var off []Step
		for _, name := range u.p.ServiceNames() {
			s := u.p.Services[name]
			if _, on := s.Networks[key]; !on {
				continue
			}
			for i := range u.byName[name] {
				c := &u.byName[name][i]
				stop := u.stop(c, "its network changes")
				st := Step{Kind: DetachNetwork, Key: key, Name: n.Name, Container: c.ID, Service: name, Number: model.Number(c), After: stop}
				gone = append(gone, u.add(st))
				off = append(off, st)
			}
		}
		rm := u.add(Step{Kind: RemoveNetwork, Key: key, Name: n.Name, After: gone, Why: "its configuration changed"})
		made := u.add(Step{Kind: CreateNetwork, Key: key, Name: n.Name, After: []int{rm}})
		u.networks[key] = []int{made}
		for _, st := range off {
			st.Kind, st.After = AttachNetwork, []int{made}
			u.rejoin[st.Container] = append(u.rejoin[st.Container], u.add(st))
		}
	}
	return nil
}

// foreign tells of objects that have the name of the project's but are not its.
func foreign(kind, name string, labels map[string]string, project string) string {
	switch p, ok := labels[model.LabelProject]; {
	case !ok:
		return fmt.Sprintf("a %s with name %s exists but was not created by compose; set `external: true` to use an existing %s", kind, name, kind)
	case p != project:
		return fmt.Sprintf("a %s with name %s exists but was created for project %q; set `external: true` to use an existing %s", kind, name, p, kind)
	}
	return ""
}

// stop plans a stop of a running container, once.
func (u *up) stop(c *container.Summary, why string) []int {
	if ids, ok := u.stopped[c.ID]; ok {
		return ids
	}
	if !running(c) {
		return nil
	}
	u.stopped[c.ID] = []int{u.add(Step{Kind: Stop, Service: model.Service(c), Number: model.Number(c), Name: model.Name(c), Container: c.ID, Why: why})}
	return u.stopped[c.ID]
}

func running(c *container.Summary) bool {
	return c.State == container.StateRunning || c.State == container.StatePaused || c.State == container.StateRestarting
}

func (u *up) planVolumes() error {
	for _, key := range u.p.VolumeNames() {
		v := u.p.Volumes[key]
		found, ok := u.o.Volumes[key]
		switch {
		case bool(v.External) && !ok:
			return fmt.Errorf("external volume %q not found: make it with 'servin volumes create %s'", v.Name, v.Name)
		case bool(v.External):
			continue
		case !ok:
			u.freshVolumes[key] = true
			u.volumes[key] = []int{u.add(Step{Kind: CreateVolume, Key: key, Name: v.Name})}
			continue
		}
		if w := foreign("volume", v.Name, found.Labels, u.p.Name); w != "" {
			u.Warnings = append(u.Warnings, w)
		}
		if !slices.Contains(u.opt.RecreateVolumes, key) {
			continue
		}
		// Whoever mounts it has to go: a volume in use cannot be removed.
		var gone []int
		for _, name := range u.p.ServiceNames() {
			s := u.p.Services[name]
			if !slices.ContainsFunc(s.Volumes, func(x types.ServiceVolumeConfig) bool { return x.Source == key }) {
				continue
			}
			for i := range u.byName[name] {
				c := &u.byName[name][i]
				gone = append(gone, u.add(Step{Kind: Remove, Service: name, Number: model.Number(c), Name: model.Name(c), Container: c.ID, Gentle: true, Why: "its volume is made anew"}))
			}
			u.byName[name] = nil
		}
		rm := u.add(Step{Kind: RemoveVolume, Key: key, Name: v.Name, After: gone, Why: "its configuration changed"})
		u.freshVolumes[key] = true
		u.volumes[key] = []int{u.add(Step{Kind: CreateVolume, Key: key, Name: v.Name, After: []int{rm}})}
	}
	return nil
}

// DivergedVolumes lists the keys of volumes that exist with another
// configuration.
func DivergedVolumes(p *types.Project, o Observed) ([]string, error) {
	var out []string
	for _, key := range p.VolumeNames() {
		v := p.Volumes[key]
		found, ok := o.Volumes[key]
		if !ok || bool(v.External) {
			continue
		}
		h, err := model.VolumeHash(v)
		if err != nil {
			return nil, err
		}
		if l := found.Labels[model.LabelHash]; l != "" && l != h {
			out = append(out, key)
		}
	}
	return out, nil
}

// service plans the containers of one service.
func (u *up) service(name string) error {
	s := u.p.Services[name]
	want := s.GetScale()
	have := u.byName[name]
	if u.opt.NoCreate {
		for i := range have {
			u.keep(&s, &have[i], nil)
		}
		return nil
	}
	policy := u.opt.RecreateDeps
	if len(u.opt.Services) == 0 || slices.Contains(u.opt.Services, name) {
		policy = u.opt.Recreate
	}
	why := map[string]string{}
	for i := range have {
		w, err := u.obsolete(s, &have[i], policy)
		if err != nil {
			return err
		}
		if w != "" {
			why[have[i].ID] = w
		}
	}
	// Those that may stay first, then by number: what is too many is at the end.
	slices.SortFunc(have, func(x, y container.Summary) int {
		if a, b := why[x.ID] != "", why[y.ID] != ""; a != b {
			if a {
				return 1
			}
			return -1
		}
		return cmp.Or(cmp.Compare(model.Number(&x), model.Number(&y)), cmp.Compare(y.Created, x.Created))
	})
	after := append(u.needs(&s), u.cleared[name]...)
	next := 1
	for i := range have {
		next = max(next, model.Number(&have[i])+1)
	}
	if slices.ContainsFunc(have[:min(want, len(have))], func(c container.Summary) bool { return why[c.ID] != "" }) {
		// Those who asked to be restarted with it stop before it is replaced.
		for _, d := range model.Dependents(u.p, name) {
			for i := range u.byName[d] {
				after = append(after, u.stop(&u.byName[d][i], fmt.Sprintf("%s, which it depends on, is replaced", name))...)
			}
		}
	}
	for i := range have {
		c := &have[i]
		n := model.Number(c)
		switch {
		case i >= want:
			u.add(Step{Kind: Remove, Service: name, Number: n, Name: model.Name(c), Container: c.ID, Gentle: true, Why: fmt.Sprintf("service %s is scaled to %d", name, want)})
			u.remade[name] = u.remade[name] || i == 0
		case why[c.ID] != "":
			if n == 0 {
				n, next = next, next+1
			}
			st := Step{Kind: Recreate, Service: name, Number: n, Name: model.ContainerName(u.p.Name, &s, u.opt.Separator, n), Container: c.ID, Why: why[c.ID],
				After: append(append(slices.Clone(after), u.stopped[c.ID]...), u.rejoin[c.ID]...)}
			id := u.add(st)
			u.made[name] = append(u.made[name], id)
			u.remade[name] = true
			u.starts = append(u.starts, pending{name, Step{Kind: Start, Service: name, Number: n, Name: st.Name, After: []int{id}}})
		default:
			u.keep(&s, c, append(slices.Clone(u.stopped[c.ID]), u.rejoin[c.ID]...))
		}
	}
	for i := len(have); i < want; i++ {
		n := next
		next++
		cname := model.ContainerName(u.p.Name, &s, u.opt.Separator, n)
		id := u.add(Step{Kind: Create, Service: name, Number: n, Name: cname, After: after})
		u.made[name] = append(u.made[name], id)
		u.remade[name] = u.remade[name] || len(have) == 0
		u.starts = append(u.starts, pending{name, Step{Kind: Start, Service: name, Number: n, Name: cname, After: []int{id}}})
	}
	return nil
}

// keep plans a container that stays: it runs or is started.
func (u *up) keep(s *types.ServiceConfig, c *container.Summary, stops []int) {
	st := Step{Service: s.Name, Number: model.Number(c), Name: model.Name(c), Container: c.ID}
	if c.State == container.StateRunning && len(stops) == 0 {
		st.Kind = Keep
		id := u.add(st)
		u.made[s.Name] = append(u.made[s.Name], id)
		u.started[s.Name] = append(u.started[s.Name], id)
		return
	}
	st.Kind, st.After = Start, append(slices.Clone(stops), u.made[s.Name]...)
	u.starts = append(u.starts, pending{s.Name, st})
}

// needs lists the steps that must be done before a container of s can be made.
func (u *up) needs(s *types.ServiceConfig) []int {
	var after []int
	for _, n := range slices.Sorted(maps.Keys(s.Networks)) {
		after = append(after, u.networks[n]...)
	}
	for _, v := range s.Volumes {
		after = append(after, u.volumes[v.Source]...)
	}
	for _, d := range References(s) {
		after = append(after, u.made[d]...)
	}
	slices.Sort(after)
	return slices.Compact(after)
}

// References lists the services whose containers a service's own containers
