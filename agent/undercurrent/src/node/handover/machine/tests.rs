//! What a holder decides, told as the stories that it must stand up to.

use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::{
    super::wire::{Former, Message},
    Action::{self, *},
    Event::{self, *},
    Machine,
};

const DRAIN: Duration = Duration::from_secs(5);

/// Runs events, a second apart; the actions of the last.
fn after(machine: &mut Machine, now: &mut Instant, events: &[Event]) -> Vec<Action> {
    let mut last = Vec::new();
    for event in events {
        *now += Duration::from_secs(1);
        last = machine.on(event.clone(), *now);
    }
    last
}

fn in_charge() -> (Machine, Instant) {
    let (mut machine, mut now) = (Machine::new(false, DRAIN, false), Instant::now());
    assert_eq!(after(&mut machine, &mut now, &[Worker(Message::Serving)]), [Listen]);
    (machine, now)
}

/// Lets time pass until nothing is due any more; all actions.
fn wait(machine: &mut Machine, now: &mut Instant) -> Vec<Action> {
    let mut all = Vec::new();
    for _ in 0..50 {
        let Some(date) = machine.next_date() else { break };
        *now = date.max(*now);
        all.extend(machine.tick(*now));
    }
    all
}

#[test]
fn a_successor_takes_over() {
    let (mut machine, mut now) = in_charge();
    let steps = [SuccessorJoined, Successor(Message::Ready)];
    assert_eq!(after(&mut machine, &mut now, &steps), [ToWorker(Message::Yield)]);
    let yielded = after(&mut machine, &mut now, &[Worker(Message::Yielded)]);
    assert_eq!(yielded, [ToSuccessor(Message::Yielded)]);
    let serving = after(&mut machine, &mut now, &[Successor(Message::Serving)]);
    assert_eq!(serving, [LetGo, ToWorker(Message::Drain)]);
    assert!(!machine.takes_successor());
    assert_eq!(
        after(&mut machine, &mut now, &[WorkerEnded(Some(0))]),
        [CloseSuccessor, Exit(0)]
    );
}

#[test]
fn a_new_agent_waits_for_the_predecessors_word() {
    let (mut machine, mut now) = (Machine::new(true, DRAIN, false), Instant::now());
    let ready = after(&mut machine, &mut now, &[Worker(Message::Ready)]);
    assert_eq!(ready, [ToPredecessor(Message::Ready)]);
    let yielded = after(&mut machine, &mut now, &[Predecessor(Message::Yielded)]);
    assert_eq!(yielded, [ToWorker(Message::Yielded)]);
    let serving = after(&mut machine, &mut now, &[Worker(Message::Serving)]);
    assert_eq!(serving, [ToPredecessor(Message::Serving), Listen]);
    let gone = after(&mut machine, &mut now, &[PredecessorGone { answers: false }]);
    assert_eq!(gone, [ToWorker(Message::Gone)]);
}

#[test]
fn a_successor_that_dies_half_way_leaves_the_node_to_the_old_agent() {
    let (mut machine, mut now) = in_charge();
    let steps = [
        SuccessorJoined,
        Successor(Message::Ready),
        Worker(Message::Yielded),
        SuccessorGone,
    ];
    assert_eq!(after(&mut machine, &mut now, &steps), [ToWorker(Message::Resume)]);
    assert!(machine.takes_successor());
    // And one that says nothing any more.
    let steps = [SuccessorJoined, Successor(Message::Ready), Worker(Message::Yielded)];
    after(&mut machine, &mut now, &steps);
    assert_eq!(
        wait(&mut machine, &mut now),
        [CloseSuccessor, ToWorker(Message::Resume)]
    );
}

#[test]
fn a_worker_that_hangs_holds_up_no_successor() {
    let (mut machine, mut now) = in_charge();
    after(&mut machine, &mut now, &[SuccessorJoined, Successor(Message::Ready)]);
    now = machine.next_date().unwrap();
    assert_eq!(machine.tick(now), [ToSuccessor(Message::Yielded)]);
    after(&mut machine, &mut now, &[Successor(Message::Serving)]);
    now = machine.next_date().unwrap();
    assert_eq!(machine.tick(now), [KillWorker]);
}

#[test]
fn a_crash_is_repaired_and_one_at_the_start_is_told() {
    let (mut machine, mut now) = in_charge();
    assert_eq!(after(&mut machine, &mut now, &[WorkerEnded(None)]), []);
    assert_eq!(wait(&mut machine, &mut now), [Spawn(Former::Gone)]);
    assert_eq!(after(&mut machine, &mut now, &[Worker(Message::Serving)]), []);
    let (mut new, mut now) = (Machine::new(false, DRAIN, false), Instant::now());
    assert_eq!(after(&mut new, &mut now, &[WorkerEnded(Some(3))]), [Exit(3)]);
}

#[test]
fn a_crash_is_repaired_while_the_predecessor_finishes_its_connections() {
    let (mut machine, mut now) = (Machine::new(true, DRAIN, false), Instant::now());
    assert_eq!(machine.former(), Former::InCharge);
    let steps = [
        Worker(Message::Ready),
        Predecessor(Message::Yielded),
        Worker(Message::Serving),
        WorkerEnded(None),
    ];
    after(&mut machine, &mut now, &steps);
    let started = wait(&mut machine, &mut now);
    assert_eq!(started, [Spawn(Former::Finishes)]);
    let gone = after(&mut machine, &mut now, &[PredecessorGone { answers: false }]);
    assert_eq!(gone, [ToWorker(Message::Gone)]);
    after(&mut machine, &mut now, &[Worker(Message::Serving), WorkerEnded(None)]);
    assert_eq!(wait(&mut machine, &mut now), [Spawn(Former::Gone)]);
}

#[test]
fn the_successor_hears_of_no_end_before_the_predecessors() {
    let retired = || {
        let (mut machine, mut now) = (Machine::new(true, DRAIN, false), Instant::now());
        let steps = [
            Worker(Message::Ready),
            Predecessor(Message::Yielded),
            Worker(Message::Serving),
            SuccessorJoined,
            Successor(Message::Ready),
            Worker(Message::Yielded),
            Successor(Message::Serving),
        ];
        after(&mut machine, &mut now, &steps);
        assert_eq!(after(&mut machine, &mut now, &[WorkerEnded(Some(0))]), []);
        (machine, now)
    };
    let (mut machine, mut now) = retired();
    let ended = after(&mut machine, &mut now, &[PredecessorGone { answers: false }]);
    assert_eq!(ended, [CloseSuccessor, Exit(0)]);
    // Told to end it still waits; told again it does not.
    let (mut machine, mut now) = retired();
    assert_eq!(after(&mut machine, &mut now, &[Terminate]), []);
    assert_eq!(after(&mut machine, &mut now, &[Terminate]), [Exit(0)]);
}

#[test]
fn a_worker_that_crashes_again_and_again_is_given_up() {
    let (mut machine, mut now) = in_charge();
    let mut tries = 0;
    loop {
        let actions = after(&mut machine, &mut now, &[WorkerEnded(None)]);
        if actions == [Exit(1)] {
            break;
        }
        assert_eq!(wait(&mut machine, &mut now), [Spawn(Former::Gone)]);
        tries += 1;
    }
    assert_eq!(tries, super::CRASHES);
}

#[test]
fn told_to_end_it_waits_for_a_successor_that_is_coming_and_for_nobody_else() {
    let (mut machine, mut now) = in_charge();
    assert_eq!(after(&mut machine, &mut now, &[Terminate]), [TellWorkerToEnd]);
    assert_eq!(after(&mut machine, &mut now, &[WorkerEnded(Some(0))]), [Exit(0)]);

    let (mut machine, mut now) = in_charge();
    assert_eq!(after(&mut machine, &mut now, &[SuccessorJoined, Terminate]), []);
    assert_eq!(
        after(&mut machine, &mut now, &[Successor(Message::Ready)]),
        [ToWorker(Message::Yield)]
    );
    let steps = [Worker(Message::Yielded), Successor(Message::Serving)];
    assert_eq!(after(&mut machine, &mut now, &steps), [LetGo, ToWorker(Message::Drain)]);

    let (mut machine, mut now) = in_charge();
    after(&mut machine, &mut now, &[SuccessorJoined, Terminate]);
    assert_eq!(wait(&mut machine, &mut now), [CloseSuccessor, TellWorkerToEnd]);
}

#[test]
fn in_a_pod_it_stays_until_it_is_told_to_end() {
    let (mut machine, mut now) = (Machine::new(false, DRAIN, true), Instant::now());
    let steps = [
        Worker(Message::Serving),
        SuccessorJoined,
        Successor(Message::Ready),
        Worker(Message::Yielded),
        Successor(Message::Serving),
        WorkerEnded(Some(0)),
    ];
    assert_eq!(after(&mut machine, &mut now, &steps), [CloseSuccessor]);
    assert_eq!(after(&mut machine, &mut now, &[Terminate]), [Exit(0)]);
}

#[test]
fn without_the_predecessors_word_nothing_is_taken_while_it_lives() {
    let (mut machine, mut now) = (Machine::new(true, DRAIN, false), Instant::now());
    let gone = after(&mut machine, &mut now, &[PredecessorGone { answers: true }]);
    assert_eq!(gone, [KillWorker, Exit(1)]);
    let (mut machine, mut now) = (Machine::new(true, DRAIN, false), Instant::now());
    let gone = after(&mut machine, &mut now, &[PredecessorGone { answers: false }]);
    assert_eq!(gone, [ToWorker(Message::Yielded), ToWorker(Message::Gone)]);
}

fn event() -> impl Strategy<Value = Event> {
    let message = prop_oneof![
        Just(Message::Ready),
        Just(Message::Yielded),
        Just(Message::Serving),
        Just(Message::Drain),
        Just(Message::Unknown),
    ];
    let told = message.prop_flat_map(|message| {
        prop_oneof![
            Just(Worker(message.clone())),
            Just(Successor(message.clone())),
            Just(Predecessor(message)),
        ]
    });
    prop_oneof![
        8 => told,
        1 => Just(WorkerEnded(None)),
        1 => Just(SuccessorJoined),
        1 => Just(SuccessorGone),
        1 => any::<bool>().prop_map(|answers| PredecessorGone { answers }),
        1 => Just(Terminate),
    ]
}

proptest! {
    /// Whatever happens in whatever order: a worker is told to drain only after somebody else serves, and no wait is for
    /// ever once a holder has been told to end.
    #[test]
    fn the_node_is_never_nobodys(joins in any::<bool>(), events in proptest::collection::vec(event(), 0..40)) {
        let (mut machine, mut now) = (Machine::new(joins, DRAIN, false), Instant::now());
        let mut successor_served = false;
        for event in events {
            now += Duration::from_secs(1);
            successor_served |= event == Successor(Message::Serving);
            let mut actions = machine.on(event, now);
            actions.extend(machine.tick(now));
            for action in &actions {
                prop_assert!(*action != ToWorker(Message::Drain) || successor_served);
                prop_assert!(*action != LetGo || successor_served);
                // Nobody would say Yielded to it.
                let waits = *action == Spawn(Former::InCharge);
                prop_assert!(!waits, "a worker that is started again waits for the node");
            }
            if actions.iter().any(|action| matches!(action, Exit(_))) {
                return Ok(());
            }
        }
        // Told to end twice, a worker ends by itself, or is killed.
        for event in [Terminate, Terminate, WorkerEnded(Some(0))] {
            let mut actions = machine.on(event, now);
            actions.extend(wait(&mut machine, &mut now));
            if actions.iter().any(|action| matches!(action, Exit(_))) {
                return Ok(());
            }
        }
        let actions = machine.on(SuccessorGone, now);
        prop_assert!(actions.iter().any(|action| matches!(action, Exit(_))), "it never ends: {machine:?}");
    }
}
