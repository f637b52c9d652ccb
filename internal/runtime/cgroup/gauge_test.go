package cgroup

import (
	"testing"

	contract "github.com/cloudos-io/cloudos/internal/runtime"
)

func TestPressure(t *testing.T) {
	got := pressure("some avg10=1.50 avg60=0.25 avg300=0.00 total=1234\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n")
	want := contract.Pressure{Some: contract.Stall{Total: 1234000, Avg10: 1.5, Avg60: 0.25}, Full: contract.Stall{Total: 7000}}
	if got != want {
		t.Errorf("%+v", got)
	}
	for _, s := range []string{"", "some", "full total=x", "\n\n", "some avg10 total"} {
		pressure(s) // must not fail
	}
}

func TestGauge(t *testing.T) {
	h, parent := host(t)
	g, err := h.Create(parent, "gauge")
	if err != nil {
		t.Fatal(err)
	}
	defer g.Remove(t.Context())
	a, err := g.Gauge()
	if err != nil {
		t.Fatal(err)
	}
	b, err := g.Stats()
	if err != nil {
		t.Fatal(err)
	}
	if a.CgroupV2 != b.CgroupV2 || a.Pids != b.Pids || a.CPUTotal > b.CPUTotal || len(a.MemoryStat) == 0 && len(b.MemoryStat) > 0 {
		t.Errorf("%+v, %+v", a, b)
	}
	for k, v := range a.MemoryStat {
		if b.MemoryStat[k] != v {
			t.Errorf("%s: %d, %d", k, v, b.MemoryStat[k])
		}
	}
	if _, err := g.Details(); err != nil {
		t.Error(err)
	}
}
