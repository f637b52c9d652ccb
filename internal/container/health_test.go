package container

import (
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
)

func TestHealthJudge(t *testing.T) {
	h, ok := NewHealthCheck(&container.HealthConfig{Test: []string{"CMD", "true"}, StartPeriod: 10 * time.Second, Retries: 2})
	if !ok || h.Interval != HealthInterval || h.Timeout != HealthTimeout || h.StartInterval != HealthStartInterval {
		t.Fatalf("defaults: %+v, %v", h, ok)
	}
	type step struct {
		exit   int
		up     time.Duration
		status container.HealthStatus
		streak int
	}
	for name, steps := range map[string][]step{
		"start period forgives":  {{1, 1 * time.Second, container.Starting, 0}, {1, 9 * time.Second, container.Starting, 0}, {1, 11 * time.Second, container.Starting, 1}, {1, 12 * time.Second, container.Unhealthy, 2}},
		"success ends leniency":  {{0, time.Second, container.Healthy, 0}, {1, 2 * time.Second, container.Healthy, 1}, {1, 3 * time.Second, container.Unhealthy, 2}, {0, 4 * time.Second, container.Healthy, 0}},
		"odd exit codes fail":    {{-1, 20 * time.Second, container.Starting, 1}, {2, 21 * time.Second, container.Unhealthy, 2}},
		"streak goes on growing": {{1, 20 * time.Second, container.Starting, 1}, {1, 21 * time.Second, container.Unhealthy, 2}, {1, 22 * time.Second, container.Unhealthy, 3}},
	} {
		var cur *container.Health
		for i, s := range steps {
			before := cur
			cur = h.Judge(cur, container.HealthcheckResult{ExitCode: s.exit}, s.up)
			if cur.Status != s.status || cur.FailingStreak != s.streak {
				t.Errorf("%s, step %d: %s/%d, want %s/%d", name, i, cur.Status, cur.FailingStreak, s.status, s.streak)
			}
			if before != nil && len(before.Log) != i {
				t.Errorf("%s, step %d: the former health was changed", name, i)
			}
		}
	}
	var cur *container.Health
	for i := range 9 {
		cur = h.Judge(cur, container.HealthcheckResult{ExitCode: i}, 0)
	}
	if len(cur.Log) != HealthLogSize || cur.Log[HealthLogSize-1].ExitCode != 8 {
		t.Errorf("log keeps %d results, last %d", len(cur.Log), cur.Log[len(cur.Log)-1].ExitCode)
	}
	if d := h.Delay(container.Starting, time.Second); d != HealthStartInterval {
		t.Errorf("delay within the start period: %v", d)
	}
	if d := h.Delay(container.Healthy, time.Second); d != HealthInterval {
		t.Errorf("delay once healthy: %v", d)
	}
}

func TestNewHealthCheckNothingToCheck(t *testing.T) {
	for _, test := range [][]string{nil, {}, {"NONE"}, {"CMD"}, {"SHELL", "x"}, {"NONE", "x"}} {
		if _, ok := NewHealthCheck(&container.HealthConfig{Test: test}); ok {
			t.Errorf("%q is a health check", test)
		}
	}
	if _, ok := NewHealthCheck(nil); ok {
		t.Error("nil is a health check")
	}
}
